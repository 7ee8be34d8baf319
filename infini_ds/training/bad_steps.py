"""Decides by `train.on_bad_step` what follows a bad step."""

import numpy as np
from torch import Tensor

from infini_ds.config import TrainConfig
from infini_ds.data.lanes import Plan
from infini_ds.errors import RunError


class BadSteps:
    """The bad steps of a run; the same on all ranks.

    Attributes:
        skip: bad steps since the last checkpoint, whose windows are not read again.
        rollbacks: how often the run went back to a checkpoint.
    """

    def __init__(self, settings: TrainConfig):
        self._settings = settings
        self.skip: set[int] = set()
        self.rollbacks = 0

    def must_roll_back(self, step: int, fault: str, in_a_row: int) -> bool:
        """Returns whether the run must go back to a checkpoint rather than only skip the update.

        Args:
            step: the bad step, counted from 0.
            fault: why it was bad.
            in_a_row: number of consecutive bad steps up to this one.

        Raises:
            RunError: the setting asks to stop, or there were too many bad steps.
        """
        policy, at_most = self._settings.on_bad_step, self._settings.max_skipped_steps
        if policy == "stop":
            raise RunError(
                f"{fault} at step {step + 1}, and train.on_bad_step is stop; the last good "
                "checkpoint is kept"
            )
        rolling_back = policy == "rollback"
        count = len(self.skip) + 1 if rolling_back else in_a_row
        if count >= at_most:
            since = "since the last checkpoint" if rolling_back else "in a row"
            raise RunError(
                f"{fault} in {count} steps {since} (train.max_skipped_steps); the last good "
                "checkpoint is kept: lower optimizer.learning_rate, or look at the data near "
                f"step {step + 1}"
            )
        return rolling_back

    def rolled_back(self, step: int) -> None:
        """Records the step that sent the run back, so that its window is not read again."""
        self.skip.add(step)
        self.rollbacks += 1

    def saved(self, step: int) -> None:
        """Forgets the bad steps before this checkpoint, since no run goes back beyond it."""
        self.skip = {bad for bad in self.skip if bad >= step}


def bad_documents(bad_lanes: Tensor, plan: Plan) -> list[int]:
    """Returns the documents that the marked lanes read in a step."""
    bad = bad_lanes.cpu().numpy() > 0
    documents = plan.documents[bad].reshape(-1)
    if plan.guests is not None:
        guests = plan.guests.documents[bad[plan.guests.segments // plan.documents.shape[1]]]
        documents = np.concatenate((documents, guests))
    return np.unique(documents).tolist()
