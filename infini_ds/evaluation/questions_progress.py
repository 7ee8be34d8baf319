"""Shows the progress of an evaluation that asks questions about long documents."""

from infini_ds.system.console import Console
from infini_ds.system.progress import ProgressLine, time_left


class QuestionsProgress(ProgressLine):
    """Shows the documents done, tokens per second and the time left.

    Args:
        name: of the command.
        plan: pairs of a length in segments and the number of documents of that length.
        segment_length: tokens per segment.
    """

    def __init__(
        self, console: Console, name: str, plan: list[tuple[int, int]], segment_length: int
    ):
        self._name = name
        self._documents = sum(samples for _, samples in plan)
        self._tokens = sum((segments - 1) * samples for segments, samples in plan) * segment_length
        self._documents_done = self._tokens_done = 0
        super().__init__(console, "", self._tokens, *time_left())

    @property
    def tokens_per_second(self) -> float:
        """Tokens read since the start, divided by the time that has passed."""
        return self._tokens_done / self.seconds

    def read(self, tokens: int) -> None:
        """Reports that this many more tokens have been read."""
        self._tokens_done += tokens
        self._show()

    def answered(self, documents: int) -> None:
        """Reports that this many more documents are done."""
        self._documents_done += documents
        self._show()

    def _show(self) -> None:
        rate = self.tokens_per_second
        line = (
            f"{self._name}: {self._documents_done:,} of {self._documents:,} documents, "
            f"{rate:,.0f} tokens/s"
        )
        self.show(self._tokens_done, line, (self._tokens - self._tokens_done) / rate)
