"""Shows the progress of all runs of a comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

from infini_ds.system.console import Console
from infini_ds.system.progress import ProgressLine

if TYPE_CHECKING:
    from infini_ds.benchmarks.quality_run import Progress


class QualityProgress(ProgressLine):
    """Shows the steps, the loss of each unfinished run, tokens per second and the time left.

    Args:
        runs: total number of runs.
        steps: number of steps of each run.
    """

    def __init__(self, console: Console, runs: int, steps: int):
        super().__init__(console, "bench quality", float(runs))
        self._runs = runs
        self._steps = steps
        self._tokens = 0
        self._latest: dict[str, Progress] = {}

    def update(self, name: str, progress: Progress) -> None:
        """Reports progress of the run with this name."""
        self._latest[name] = progress
        self._tokens += progress.tokens
        share = sum(latest.share for latest in self._latest.values()) / self._runs
        self.show(share * self._runs, self._line(self.seconds, share))

    def _line(self, seconds: float, share: float) -> str:
        steps = sum(latest.step for latest in self._latest.values())
        losses = ", ".join(
            f"{name} {latest.loss:.3f}" for name, latest in self._latest.items() if latest.share < 1
        )
        return (
            f"bench quality: {steps:,} of {self._runs * self._steps:,} steps"
            f"{f' (loss of {losses})' if losses else ''}, {self._tokens / seconds:,.0f} tokens/s, "
            f"{seconds * (1 - share) / share:,.0f} s left"
        )
