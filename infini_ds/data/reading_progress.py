"""Progress of a model that reads."""

from rich.console import Console

from infini_ds.data.progress import ProgressLine, time_left


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
