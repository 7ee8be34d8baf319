"""Computes how long a training step takes by its schedule, as if messages took no time."""

from typing import NamedTuple

from infini_ds.parallel.pipeline.schedule import Backward, Forward, train_schedule


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
    left = [list(train_schedule(stage, stages, micro_batches, chunks)) for stage in range(stages)]
    for units in left:
        units.reverse()
    # A Forward and a Backward of the same unit are equal as tuples, so the type is part of the key.
    done: dict[tuple[type, int, Forward | Backward], float] = {}
    clock = [0.0] * stages
    while any(left):
        for stage, units in enumerate(left):
            while units:
                kind, unit = type(units[-1]), units[-1]
                source, costs = (stage - 1, forward) if kind is Forward else (stage + 1, backward)
                arrived = done.get((kind, source, unit)) if 0 <= source < stages else 0.0
                if arrived is None:
                    break
                clock[stage] = max(clock[stage], arrived) + costs[stage]
                done[kind, stage, units.pop()] = clock[stage]
    units = micro_batches * chunks
    busy = [units * (one + other) for one, other in zip(forward, backward, strict=True)]
    return StepTime(max(clock), busy)


def most_units(stage: int, stages: int, micro_batches: int, chunks: int) -> int:
    """Returns the most units that a stage keeps for their backward pass at one time."""
    kept = most = 0
    for unit in train_schedule(stage, stages, micro_batches, chunks):
        kept += 1 if isinstance(unit, Forward) else -1
        most = max(most, kept)
    return most
