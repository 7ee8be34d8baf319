"""Progress of a long pass over a corpus: a bar on a terminal, a line now and then elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class CorpusProgress:
    """Shows how far a pass is and how fast it goes. A context manager.

    Args:
        total: what `done` reaches at the end; 0 where it is not known, then no end is predicted.
    """

    def __init__(self, console: Console, title: str, total: int):
        self._console = console
        self._title = title
        self._total = total
        self._began = time.monotonic()
        self._next_line = self._began + _SECONDS_BETWEEN_LINES
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(title, total=total or None)

    def __enter__(self) -> "CorpusProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, documents: int, text_bytes: int) -> None:
        """Says where the pass is: `done` of the total, and how much has been read."""
        now = time.monotonic()
        seconds = max(now - self._began, 1e-9)
        rate = text_bytes / seconds / 1e6
        line = (
            f"{self._title}: {documents:,} documents, {text_bytes / 1e6:,.1f} MB, {rate:.1f} MB/s"
        )
        if self._bar:
            self._bar.update(self._task, completed=done, description=line)
        elif now >= self._next_line:
            if 0 < done < self._total:
                line += f", {seconds * (self._total - done) / done:,.0f} s left"
            self._console.print(line, highlight=False, soft_wrap=True)
            self._next_line = now + _SECONDS_BETWEEN_LINES
