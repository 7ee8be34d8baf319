"""Shows the progress of long work: a bar on a terminal, a line now and then elsewhere."""

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
    """Returns the columns of a bar that show the time left."""
    return [TextColumn("left"), TimeRemainingColumn()]


class ProgressLine:
    """One line that tells how far some work has come. A context manager.

    Args:
        title: text of the bar before the first line.
        total: the value of `done` at the end; 0 if it is not known.
        columns: columns after the line and the bar itself.
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
        """Seconds since the beginning, always above 0."""
        return max(time.monotonic() - self._began, 1e-9)

    def show(self, done: float, line: str, left: float | None = None) -> None:
        """Shows the position on a bar, or else in a line with the seconds left, if known."""
        now = time.monotonic()
        if self._bar:
            self._bar.start()  # started here, so that instant work shows no bar
            self._bar.update(self._task, completed=done, description=line)
        elif now >= self._next_line:
            if left is not None:
                line += f", {left:,.0f} s left"
            with contextlib.suppress(RunError):  # failing to report must not end the work
                self._console.print(line)
            self._next_line = now + _SECONDS_BETWEEN_LINES


class ReadingProgress(ProgressLine):
    """Shows how much has been read, tokens per second and the time left.

    Args:
        title: description of the work.
        total: the value of `done` at the end; if it is 0, for unknown, no end is predicted.
        unit: unit of `done` and `total`.
    """

    def __init__(self, console: Console, title: str, total: int, unit: str):
        super().__init__(console, title, total, *time_left())
        self._title, self._total, self._unit = title, total, unit
        self._tokens = 0

    def __enter__(self) -> "ReadingProgress":
        return self  # the bar starts with the first update

    @property
    def tokens_per_second(self) -> float:
        """Tokens read since the beginning, divided by the elapsed seconds."""
        return self._tokens / self.seconds

    def update(self, done: int, tokens: int) -> None:
        """Reports that `done` of the total is read, and `tokens` more since the last call."""
        self._tokens += tokens
        of_total = f" of {self._total:,}" if self._total else ""
        line = (
            f"{self._title}: {done:,}{of_total} {self._unit}, "
            f"{self.tokens_per_second:,.0f} tokens/s"
        )
        left = self.seconds * (self._total - done) / max(done, 1)
        self.show(done, line, left if self._total else None)


class BytesBar:
    """A bar of bytes written, shown only on a terminal. A context manager.

    Args:
        total: number of bytes to write.
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
        """Reports that `written` more bytes are written."""
        self._bar.advance(self._task, written)
