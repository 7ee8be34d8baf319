"""What train.on_bad_step decides, without a run around it."""

import numpy as np
import pytest
import torch

from infini_ds.config import TrainConfig
from infini_ds.data.lanes import Guests, Plan
from infini_ds.errors import RunError
from infini_ds.training.bad_steps import BadSteps, bad_documents

FAULT = "the loss was not finite"


def bad_steps(policy: str) -> BadSteps:
    train = TrainConfig(steps=9, batch_size=3, on_bad_step=policy, max_skipped_steps=3)
    return BadSteps(train)


def test_skip_goes_on_until_there_are_too_many_in_a_row():
    steps = bad_steps("skip")
    assert not steps.must_roll_back(7, FAULT, in_a_row=2)
    with pytest.raises(RunError, match=r"not finite in 3 steps in a row \(train.max_skipped_st"):
        steps.must_roll_back(8, FAULT, in_a_row=3)


def test_stop_ends_the_run_with_the_step():
    with pytest.raises(RunError, match=r"not finite at step 8, and train.on_bad_step is st"):
        bad_steps("stop").must_roll_back(7, FAULT, in_a_row=1)


def test_rollback_goes_back_until_it_has_too_often():
    steps = bad_steps("rollback")
    for step in (5, 6):
        assert steps.must_roll_back(step, FAULT, in_a_row=1)
        steps.rolled_back(step)
    assert (steps.skip, steps.rollbacks) == ({5, 6}, 2)
    with pytest.raises(RunError, match="not finite in 3 steps since the last checkpoint"):
        steps.must_roll_back(7, FAULT, in_a_row=1)


def test_only_steps_after_the_last_checkpoint_count():
    steps = bad_steps("rollback")
    for step in (5, 6):
        steps.rolled_back(step)
    steps.saved(6)
    assert (steps.skip, steps.rollbacks) == ({6}, 2)
    assert steps.must_roll_back(7, FAULT, in_a_row=1)


def test_documents_of_bad_lanes_are_named_once():
    documents = np.array([[4, 4], [9, 2], [9, 9]])
    plan = Plan(documents, documents * 0, documents * 0 + 1, documents < 0)
    assert bad_documents(torch.tensor([0.0, 1.0, 2.0]), plan) == [2, 9]
    assert bad_documents(torch.zeros(3), plan) == []


def test_guests_of_bad_lanes_are_named_too():
    documents = np.array([[4, 4], [9, 2], [9, 9]])
    segments, guests = np.array([1, 2, 5]), np.array([7, 8, 3])
    plan = Plan(
        documents, documents * 0, documents * 0 + 1, documents < 0,
        Guests(segments, segments, guests, segments),
    )  # fmt: skip
    assert bad_documents(torch.tensor([0.0, 1.0, 0.0]), plan) == [2, 8, 9]
    assert bad_documents(torch.tensor([1.0, 0.0, 1.0]), plan) == [3, 4, 7, 9]
