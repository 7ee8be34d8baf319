import itertools

import pytest

from infini_ds.parallel.pipeline.transport import TRANSPORTS, Carried, Resident

BOUNDS = [(0, 4), (0, 2, 4), (0, 3, 4), (0, 1, 2, 4), (0, 2, 4, 5, 7)]
HOPS = [
    pytest.param(bounds, stage, id=f"bounds{'_'.join(map(str, bounds))}-hop{stage}")
    for bounds in BOUNDS
    for stage in range(len(bounds) - 2)
]


def riding(transport, stage, chunks):
    return [transport.riding(stage, chunk == 0, chunk == chunks - 1) for chunk in range(chunks)]


@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
@pytest.mark.parametrize(("bounds", "stage"), HOPS)
def test_carried_memory_of_each_layer_crosses_each_hop_once(bounds, stage, chunks):
    crossed = itertools.chain(*riding(Carried(bounds), stage, chunks))
    assert sorted(crossed) == list(range(bounds[-1]))


@pytest.mark.parametrize("chunks", [2, 3, 5])
@pytest.mark.parametrize(("bounds", "stage"), HOPS)
def test_carried_memory_crosses_before_it_is_read_and_after_it_was_written(bounds, stage, chunks):
    first, *others, last = riding(Carried(bounds), stage, chunks)
    end = bounds[stage + 1]
    assert set(first) == set(range(end, bounds[-1]))
    assert set(last) == set(range(end))
    assert not any(others)


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize(("bounds", "stage"), HOPS)
def test_resident_memory_never_crosses(bounds, stage, chunks):
    assert not any(riding(Resident(bounds), stage, chunks))


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("name", TRANSPORTS)
def test_every_memory_is_held_by_exactly_one_stage(name, bounds):
    transport = TRANSPORTS[name](bounds)
    held = itertools.chain(*(transport.held(stage) for stage in range(len(bounds) - 1)))
    assert sorted(held) == list(range(bounds[-1]))


def test_carried_memory_is_held_by_the_first_stage_and_returns_there():
    transport = Carried((0, 2, 4))
    assert transport.returns
    assert list(transport.held(0)) == [0, 1, 2, 3]


def test_resident_memory_is_held_by_its_own_stage():
    transport = Resident((0, 1, 4))
    assert not transport.returns
    assert list(transport.held(1)) == [1, 2, 3]
