"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from infini_ds.errors import RunError

_SECONDS_BETWEEN_LINES = 10.0


def time_left() -> list[ProgressColumn]:
    """Columns of a bar that tell the time left."""
    return [TextColumn("left"), TimeRemainingColumn()]


class ProgressLine:
    """One line that tells how far some work is. A context manager.

    Args:
        title: what a bar says before the first line.
        total: what `done` reaches at the end; 0 where it is not known.
        columns: of a bar, after the line and the bar itself.
    """

    def __init__(self, console: Console, title: str, total: float, *columns: ProgressColumn):
        self._console = console
        self._began = time.monotonic()
        self._next_line = self._began + _SECONDS_BETWEEN_LINES
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(), *columns,
                console=console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(title, total=total or None)

    def __enter__(self):
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since the beginning, above 0."""
        return max(time.monotonic() - self._began, 1e-9)

    def show(self, done: float, line: str, left: float | None = None) -> None:
        """Says where the work is: on a bar, or else in a line with the seconds left, if known."""
        now = time.monotonic()
        if self._bar:
            self._bar.start()  # where work that is done at once shows nothing
            self._bar.update(self._task, completed=done, description=line)
        elif now >= self._next_line:
            if left is not None:
                line += f", {left:,.0f} s left"
            with contextlib.suppress(RunError):  # no work ends because it cannot tell of itself
                self._console.print(line, highlight=False, soft_wrap=True)
            self._next_line = now + _SECONDS_BETWEEN_LINES


class CorpusProgress(ProgressLine):
    """How far a pass over a corpus is and how fast it goes.

    Args:
        total: what `done` reaches at the end; 0 where it is not known, then no end is predicted.
    """

    def __init__(self, console: Console, title: str, total: int):
        super().__init__(console, title, total, TimeElapsedColumn(), *time_left())
        self._title = title
        self._total = total

    def update(self, done: int, documents: int, text_bytes: int) -> None:
        """Says where the pass is: `done` of the total, and how much has been read."""
        seconds = self.seconds
        rate = text_bytes / seconds / 1e6
        line = (
            f"{self._title}: {documents:,} documents, {text_bytes / 1e6:,.1f} MB, {rate:.1f} MB/s"
        )
        known = 0 < done < self._total
        self.show(done, line, seconds * (self._total - done) / done if known else None)
