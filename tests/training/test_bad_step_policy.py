"""What train.on_bad_step decides, without a run around it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from infini_ds.config import TrainConfig
from infini_ds.data.lanes import Plan
from infini_ds.errors import RunError
from infini_ds.pipeline.engine import CORRUPT, NOT_FINITE
from infini_ds.training.trainer import Trainer

DOCUMENTS = np.array([[4, 4], [9, 2], [9, 9]])
PLAN = Plan(DOCUMENTS, DOCUMENTS * 0, DOCUMENTS * 0 + 1, DOCUMENTS < 0)


class Decider(Trainer):
    """A trainer at step 7 whose step was bad; going back is only noted."""

    def __init__(self, policy: str, fault: str = NOT_FINITE, in_a_row: int = 1, skip=()):
        train = TrainConfig(steps=9, batch_size=3, on_bad_step=policy, max_skipped_steps=3)
        self.config = SimpleNamespace(train=train)
        self.store = SimpleNamespace(path="the/store")
        bad = torch.tensor([0.0, 1.0, 0.0]) if fault == CORRUPT else torch.zeros(3)
        self.engine = SimpleNamespace(fault=fault, bad_lanes=bad, skipped_in_a_row=in_a_row)
        self.step, self.skip = 7, set(skip)
        self.went_back = None

    def _roll_back(self, fault):
        self.went_back = fault

    def decide(self) -> bool:
        return self._end_or_roll_back(PLAN)


def test_skip_goes_on_until_there_are_too_many_in_a_row():
    assert not Decider("skip", in_a_row=2).decide()
    with pytest.raises(RunError, match=r"not finite in 3 steps in a row \(train.max_skipped_st"):
        Decider("skip", in_a_row=3).decide()


def test_stop_ends_the_run_with_the_step_and_the_documents():
    with pytest.raises(RunError) as error:
        Decider("stop", CORRUPT).decide()
    assert "(data.store the/store, in train documents 2, 9) at step 8" in str(error.value)
    assert "train.on_bad_step is stop" in str(error.value)


def test_rollback_goes_back_until_it_has_too_often():
    decider = Decider("rollback", skip={5})
    assert decider.decide()
    assert decider.went_back == NOT_FINITE
    with pytest.raises(RunError, match="not finite in 3 steps since the last checkpoint"):
        Decider("rollback", skip={5, 6}).decide()
