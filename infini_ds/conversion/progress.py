"""How far a conversion is, on a terminal, and what it made."""

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn


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
