"""The time of a step by its schedule."""

import pytest

from infini_ds.parallel.pipeline.schedule import Forward, train_schedule
from infini_ds.planning.schedule_time import least_time, most_units, step_time


@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 1), (2, 4), (4, 8)])
def test_equal_stages_wait_for_the_pipeline_to_fill_and_drain(stages, micro_batches, chunks):
    time = step_time([1.0] * stages, [2.0] * stages, micro_batches, chunks)
    units = micro_batches * chunks
    assert time.busy == [3.0 * units] * stages
    # With several chunks a first backward waits for a whole window; that delays nothing.
    assert time.step == pytest.approx(3.0 * (units + stages - 1))
    assert time.bubble == pytest.approx((stages - 1) / (units + stages - 1))


def test_all_wait_for_the_slowest_stage():
    time = step_time([1.0, 1.5], [2.0, 3.0], 100, 1)
    assert time.step == pytest.approx(100 * 4.5 + 3.0)
    assert time.bubble == pytest.approx(1 - (300 + 450) / (2 * 453))


def test_work_of_one_stage_alone_is_all_there_is():
    assert step_time([1.0], [2.5], 4, 2) == (28.0, [28.0])


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("chunks", [1, 4])
def test_units_that_are_kept_are_those_of_the_schedule(stages, chunks):
    for stage in range(stages):
        assert most_units(stage, stages, 8, chunks) == chunks + stages - stage - 1
        assert most_units(stage, stages, 1, 1) == 1


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize("micro_batches", [1, 2, 7])
def test_units_that_are_kept_are_counted_as_the_schedule_goes(stages, micro_batches, chunks):
    for stage in range(stages):
        kept = most = 0
        for unit in train_schedule(stage, stages, micro_batches, chunks):
            kept += 1 if isinstance(unit, Forward) else -1
            most = max(most, kept)
        assert most_units(stage, stages, micro_batches, chunks) == most


@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [1, 2, 8])
@pytest.mark.parametrize("forward", [[1.0], [1.0, 1.5], [3.0, 1.0, 2.0], [1.0, 1.0, 1.0, 4.0]])
def test_no_step_is_faster_than_the_least_time(forward, micro_batches, chunks):
    for again in (0.0, 1.0):
        backward = [(2 + again) * own for own in forward]
        least = least_time(forward, backward, micro_batches, chunks)
        really = step_time(forward, backward, micro_batches, chunks)
        assert least.step <= really.step * (1 + 1e-12)
        assert least.busy == really.busy
    same = [1.0] * len(forward)
    least = least_time(same, same, micro_batches, chunks)
    assert least.step == pytest.approx(step_time(same, same, micro_batches, chunks).step)
