import numpy as np
import pytest

from infini_ds.data.joined import Joined

PARTS = [np.arange(5), np.empty(0, dtype=np.int64), np.arange(100, 103), np.arange(7, 20)]
WHOLE = np.concatenate(PARTS)
JOINED = Joined(PARTS)


def test_length_and_type_are_those_of_the_whole():
    assert len(JOINED) == len(WHOLE)
    assert JOINED.dtype == WHOLE.dtype


@pytest.mark.parametrize("start", [None, 0, 3, 5, 7, 20, 21])
@pytest.mark.parametrize("stop", [None, 0, 4, 5, 8, 21, 99, -1])
def test_slices_are_those_of_the_whole(start, stop):
    assert JOINED[start:stop].tolist() == WHOLE[start:stop].tolist()


@pytest.mark.parametrize("shape", [(0,), (40,), (3, 4, 5)])
def test_elements_are_those_of_the_whole(shape):
    index = np.random.default_rng(0).integers(len(WHOLE), size=shape)
    assert np.array_equal(JOINED[index], WHOLE[index])
