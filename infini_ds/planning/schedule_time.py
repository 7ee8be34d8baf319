"""Computes how long a training step takes by its schedule, as if messages took no time."""

import functools
from itertools import accumulate
from typing import NamedTuple

from infini_ds.parallel.pipeline.schedule import Forward, train_schedule


class StepTime(NamedTuple):
    """Times in the same unit as the costs of forward and backward."""

    step: float
    """Time from the first forward to the last backward of all stages."""
    busy: list[float]
    """How much of that time each stage computes."""

    @property
    def bubble(self) -> float:
        """Share of all stages' time that they wait."""
        return 1 - sum(self.busy) / (len(self.busy) * self.step)


def step_time(
    forward: list[float], backward: list[float], micro_batches: int, chunks: int
) -> StepTime:
    """Plays the schedule and returns its times.

    Args:
        forward, backward: costs of one unit by stage.
        micro_batches, chunks: see `train_schedule`.
    """
    stages = len(forward)
    orders = _orders(stages, micro_batches, chunks)
    costs = backward, forward
    # Units of a kind have one order on all stages, so the source has sent as many as it has done.
    done: tuple[list[list[float]], ...] = tuple([[] for _ in range(stages)] for _ in costs)
    clock = [0.0] * stages
    left = [len(order) for order in orders]
    while any(left):
        for stage, order in enumerate(orders):
            while left[stage]:
                is_forward = order[-left[stage]]
                source = stage - 1 if is_forward else stage + 1
                own, arrived = done[is_forward][stage], 0.0
                if 0 <= source < stages:
                    sent = done[is_forward][source]
                    if len(sent) == len(own):
                        break
                    arrived = sent[len(own)]
                clock[stage] = max(clock[stage], arrived) + costs[is_forward][stage]
                own.append(clock[stage])
                left[stage] -= 1
    units = micro_batches * chunks
    busy = [units * (one + other) for one, other in zip(forward, backward, strict=True)]
    return StepTime(max(clock), busy)


def least_time(
    forward: list[float], backward: list[float], micro_batches: int, chunks: int
) -> StepTime:
    """Works like `step_time`, but returns a step's time that the schedule cannot beat, at once.

    Nothing reaches a stage before the earlier ones have computed a unit, and its last gradient has
    to go back through them. All stages together compute at least one unit from end to end.
    """
    units = micro_batches * chunks
    unit = [one + other for one, other in zip(forward, backward, strict=True)]
    earlier = accumulate(unit[:-1], initial=0.0)
    step = max(before + units * own for before, own in zip(earlier, unit, strict=True))
    return StepTime(max(step, sum(unit)), [units * own for own in unit])


def most_units(stage: int, stages: int, micro_batches: int, chunks: int) -> int:
    """Returns the most units that a stage keeps for their backward pass at one time."""
    return min(micro_batches * chunks, chunks + stages - stage - 1)  # as `train_schedule` says


@functools.lru_cache(maxsize=16)  # alternatives ask again for each kind of checkpointing
def _orders(stages: int, micro_batches: int, chunks: int) -> list[bytes]:
    """For each stage a byte a unit, in order: 1 if it goes forward, 0 if backward."""
    return [
        bytes(
            isinstance(unit, Forward)
            for unit in train_schedule(stage, stages, micro_batches, chunks)
        )
        for stage in range(stages)
    ]
