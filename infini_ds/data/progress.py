"""Shows the progress of a pass over a corpus."""

from rich.progress import TimeElapsedColumn

from infini_ds.system.console import Console
from infini_ds.system.progress import ProgressLine, time_left


class CorpusProgress(ProgressLine):
    """Shows how far a pass over a corpus has come and how fast it goes.

    Args:
        total: the value of `done` at the end; if it is 0, for unknown, no end is predicted.
    """

    def __init__(self, console: Console, title: str, total: int):
        super().__init__(console, title, total, TimeElapsedColumn(), *time_left())
        self._title = title
        self._total = total

    def update(self, done: int, documents: int, text_bytes: int) -> None:
        """Reports the position: `done` of the total, and how much has been read."""
        seconds = self.seconds
        rate = text_bytes / seconds / 1e6
        line = (
            f"{self._title}: {documents:,} documents, {text_bytes / 1e6:,.1f} MB, {rate:.1f} MB/s"
        )
        known = 0 < done < self._total
        self.show(done, line, seconds * (self._total - done) / done if known else None)
