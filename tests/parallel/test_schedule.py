import itertools
from collections import deque

import pytest

from infini_ds.parallel.pipeline.schedule import (
    Backward,
    Forward,
    evaluation_schedule,
    train_schedule,
)

SIZES = [
    pytest.param(*sizes, id="stages{}-micro_batches{}-chunks{}".format(*sizes))
    for sizes in itertools.product(range(1, 5), range(1, 6), range(1, 4))
]


def schedules(stages, micro_batches, chunks):
    return [list(train_schedule(s, stages, micro_batches, chunks)) for s in range(stages)]


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), SIZES)
class TestTrainSchedule:
    def test_has_every_unit_once_forward_and_once_backward(self, stages, micro_batches, chunks):
        units = set(itertools.product(range(micro_batches), range(chunks)))
        expected = {Forward(*unit) for unit in units}, {Backward(*unit) for unit in units}
        for schedule in schedules(stages, micro_batches, chunks):
            forwards = [unit for unit in schedule if isinstance(unit, Forward)]
            backwards = [unit for unit in schedule if isinstance(unit, Backward)]
            assert (set(forwards), set(backwards)) == expected
            assert len(schedule) == 2 * len(units)

    def test_goes_backward_after_the_whole_window_went_forward(self, stages, micro_batches, chunks):
        for schedule in schedules(stages, micro_batches, chunks):
            done = set()
            for unit in schedule:
                if isinstance(unit, Backward):
                    window = {Forward(unit.micro_batch, chunk) for chunk in range(chunks)}
                    assert window <= done
                else:
                    done.add(unit)

    def test_takes_chunks_in_order_and_back_in_reverse(self, stages, micro_batches, chunks):
        for schedule in schedules(stages, micro_batches, chunks):
            forwards = [tuple(unit) for unit in schedule if isinstance(unit, Forward)]
            backwards = [tuple(unit) for unit in schedule if isinstance(unit, Backward)]
            assert forwards == sorted(forwards)
            assert backwards == sorted(backwards, key=lambda unit: (unit[0], -unit[1]))

    def test_keeps_no_more_units_than_it_says(self, stages, micro_batches, chunks):
        for stage, schedule in enumerate(schedules(stages, micro_batches, chunks)):
            kept = itertools.accumulate(1 if isinstance(u, Forward) else -1 for u in schedule)
            assert max(kept) == min(chunks + stages - stage - 1, micro_batches * chunks)

    def test_is_the_same_for_every_stage_on_the_wire(self, stages, micro_batches, chunks):
        """Messages carry no name: what one stage sends is what the next expects, in order."""
        for one, other in itertools.pairwise(schedules(stages, micro_batches, chunks)):
            for kind in (Forward, Backward):
                sent = [unit for unit in one if isinstance(unit, kind)]
                assert sent == [unit for unit in other if isinstance(unit, kind)]

    def test_never_deadlocks_with_blocking_receives(self, stages, micro_batches, chunks):
        assert simulate(schedules(stages, micro_batches, chunks), room=None)

    def test_never_deadlocks_when_few_messages_fit_on_the_way(self, stages, micro_batches, chunks):
        """Sends that wait until the message left, as with a full network buffer."""
        assert simulate(schedules(stages, micro_batches, chunks), room=chunks)


def simulate(schedules, room):
    """Runs all stages against each other; whether all of them end.

    A forward waits for the previous stage's message, a backward for the next one's; a send waits
    while `room` messages are under way in its direction.
    """
    stages = len(schedules)
    forward = [deque() for _ in range(stages)]  # into each stage
    backward = [deque() for _ in range(stages)]
    position = [0] * stages

    def ready(stage):
        unit = schedules[stage][position[stage]]
        down = isinstance(unit, Forward)
        peer = stage + 1 if down else stage - 1
        source = (forward if down else backward)[stage]
        first = stage == 0 if down else stage == stages - 1
        if not first and not source:
            return False
        target = (forward if down else backward)[peer] if 0 <= peer < stages else None
        return target is None or room is None or len(target) < room

    def run(stage):
        unit = schedules[stage][position[stage]]
        position[stage] += 1
        down = isinstance(unit, Forward)
        queues, peer = (forward, stage + 1) if down else (backward, stage - 1)
        first = stage == 0 if down else stage == stages - 1
        if not first:
            assert queues[stage].popleft() == tuple(unit)
        if 0 <= peer < stages:
            queues[peer].append(tuple(unit))

    while True:
        active = [s for s in range(stages) if position[s] < len(schedules[s])]
        if not active:
            return not any(map(len, forward + backward))
        movable = [stage for stage in active if ready(stage)]
        if not movable:
            return False
        for stage in movable:
            run(stage)


def test_simulation_notices_a_deadlock():
    waits_for_each_other = [
        [Forward(0, 0), Backward(0, 0), Forward(1, 0), Backward(1, 0)],
        [Forward(0, 0), Forward(1, 0), Backward(0, 0), Backward(1, 0)],
    ]
    assert not simulate(waits_for_each_other, room=None)


def test_evaluation_schedule_goes_forward_through_all_units_in_order():
    units = [Forward(0, 0), Forward(0, 1), Forward(1, 0), Forward(1, 1), Forward(2, 0)]
    assert list(evaluation_schedule(3, 2)) == [*units, Forward(2, 1)]
