"""Lists the checkpoints in a run's output directory and tells whether they can be used."""

import enum
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from infini_ds.runs import manifest

REPORT = "report.json"
"""Figures of a finished run, in its directory."""
TASKS = "tasks.json"
"""What the run's newest evaluation on tasks found, in its directory."""


class Depth(enum.IntEnum):
    """How thoroughly the files of a checkpoint are examined."""

    FINISHED = 0
    """The manifest exists; it is written after everything else."""
    SIZES = 1
    """The files exist and have the sizes that the manifest lists."""
    CHECKSUMS = 2
    """The files have the listed checksums, which means reading all of them."""


@dataclass(frozen=True)
class Checkpoint:
    """A directory with a run's state after a step, complete or not."""

    path: Path

    @property
    def step(self) -> int:
        """The step, taken from the directory's name."""
        return int(self.path.name.removeprefix("step_"))

    def problem(self, depth: Depth, names: Collection[str] | None = None) -> str | None:
        """Tells why the checkpoint cannot be used, as far as `depth` shows; None if it can.

        Args:
            names: the only files to examine; all of them by default.
        """
        if depth == Depth.FINISHED:
            return None if (self.path / manifest.NAME).exists() else manifest.UNFINISHED
        checksums = depth == Depth.CHECKSUMS
        return next(manifest.problems(self.path, checksums, names), None)


@dataclass(frozen=True)
class RunDirectory:
    """The output directory of a run."""

    path: Path

    @property
    def checkpoints_path(self) -> Path:
        """The directory that holds the checkpoints."""
        return self.path / "checkpoints"

    def checkpoints(self) -> list[Checkpoint]:
        """Lists all checkpoints, usable or not, newest first."""
        found = self.checkpoints_path.glob("step_*")
        steps = [Checkpoint(path) for path in found if re.fullmatch(r"step_\d{8,}", path.name)]
        return sorted(steps, key=lambda checkpoint: checkpoint.step, reverse=True)

    def newest(self, depth: Depth) -> Checkpoint | None:
        """Returns the newest checkpoint without a problem, as far as `depth` shows."""
        return next((found for found in self.checkpoints() if not found.problem(depth)), None)

    def checkpoint(self, step: int) -> Checkpoint:
        """Returns the checkpoint of a step, whether or not it exists."""
        return Checkpoint(self.checkpoints_path / f"step_{step:08d}")

    def reported_step(self) -> int:
        """The step at which it was finished, by its report; 0 if there is no report to go by.

        Raises:
            OSError: there is one, and it cannot be read.
        """
        try:
            figures = json.loads((self.path / REPORT).read_bytes())
        except (FileNotFoundError, ValueError):
            return 0
        step = figures.get("step") if isinstance(figures, dict) else None
        return step if isinstance(step, int) else 0
