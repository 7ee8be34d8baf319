"""What `train.on_bad_step` makes of steps that did harm."""

import numpy as np
from torch import Tensor

from infini_ds.config import TrainConfig
from infini_ds.data.lanes import Plan
from infini_ds.errors import RunError


class BadSteps:
    """The bad steps of a run; the same on all ranks.

    Attributes:
        skip: steps since the last checkpoint whose windows are not read, as they did harm.
        rollbacks: how often the run went back to a checkpoint.
    """

    def __init__(self, settings: TrainConfig):
        self._settings = settings
        self.skip: set[int] = set()
        self.rollbacks = 0

    def must_roll_back(self, step: int, fault: str, in_a_row: int) -> bool:
        """Whether the run must go back to a checkpoint, and not only leave out the update.

        Args:
            step: the bad one, counted from 0.
            fault: what was wrong with it.
            in_a_row: bad steps up to this one.

        Raises:
            RunError: the run is to end, or there were too many such steps.
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
        """The run went back because of a step, which it will not make again."""
        self.skip.add(step)
        self.rollbacks += 1

    def saved(self, step: int) -> None:
        """No run goes back beyond this checkpoint."""
        self.skip = {bad for bad in self.skip if bad >= step}


def bad_documents(bad_lanes: Tensor, plan: Plan) -> list[int]:
    """The documents that the marked lanes read in a step."""
    return np.unique(plan.documents[bad_lanes.cpu().numpy() > 0]).tolist()
