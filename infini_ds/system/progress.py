"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import time

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from infini_ds.errors import RunError
from infini_ds.system.console import Console

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
                self._console.print(line)
            self._next_line = now + _SECONDS_BETWEEN_LINES


class ReadingProgress(ProgressLine):
    """How much is read, tokens a second and the time left.

    Args:
        title: what is being done.
        total: what `done` reaches at the end; 0 where it is not known, then no end is predicted.
        unit: of both.
    """

    def __init__(self, console: Console, title: str, total: int, unit: str):
        super().__init__(console, title, total, *time_left())
        self._title, self._total, self._unit = title, total, unit
        self._tokens = 0

    def __enter__(self) -> "ReadingProgress":
        return self  # the bar begins with the first update

    @property
    def tokens_per_second(self) -> float:
        """Tokens read since the beginning over the time that has passed."""
        return self._tokens / self.seconds

    def update(self, done: int, tokens: int) -> None:
        """`done` of the total are read by now; `tokens` more since the last call."""
        self._tokens += tokens
        of_total = f" of {self._total:,}" if self._total else ""
        line = (
            f"{self._title}: {done:,}{of_total} {self._unit}, "
            f"{self.tokens_per_second:,.0f} tokens/s"
        )
        left = self.seconds * (self._total - done) / max(done, 1)
        self.show(done, line, left if self._total else None)


class BytesBar:
    """A bar of bytes written, shown on a terminal alone. A context manager.

    Args:
        total: bytes in all.
    """

    def __init__(self, console: Console, total: int):
        self._bar = Progress(
            BarColumn(), DownloadColumn(), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> "BytesBar":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def done(self, written: int) -> None:
        """So many bytes more are written."""
        self._bar.advance(self._task, written)
