import numpy as np
import pytest

from infini_ds.data.lanes import Lanes
from infini_ds.training.opening import _with_packing_of
from tests.tiny_run import tiny_config


@pytest.mark.parametrize("began_packed", [True, False], ids=["packed", "alone"])
def test_a_run_goes_on_packed_or_not_as_it_began(tmp_path, began_packed):
    config = tiny_config(tmp_path)
    assert config.packed
    lanes, began = (
        Lanes(np.full(50, 40), 32, 1, 2, 0, packing=packing) for packing in (True, began_packed)
    )
    lanes.load_state(began.state())
    resolved, remarks = _with_packing_of(lanes, config)
    assert resolved.packed == resolved.data.packing == began_packed
    assert remarks == (
        [] if began_packed
        else ["data.packing: the run began without packing and goes on without it"]
    )  # fmt: skip
