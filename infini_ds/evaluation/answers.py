"""Lets a model answer questions about long documents, with its memory on and with it ablated.

The model reads a document window by window with a memory of constant size, and then writes the
answer greedily; only the whole answer counts as right. Where a document asks for several, each
answer is written and counted on its own, after the right answers to the questions before it. With
its memory ablated, the model sees nothing but the segments of the questions, which gives the level
of guessing.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Protocol, TypeVar

import numpy as np
import torch

from infini_ds.data.tokenizer_base import Tokenizer
from infini_ds.errors import UserError
from infini_ds.evaluation.questions_progress import QuestionsProgress
from infini_ds.model.reading import CALL_TOKENS, call_width, read_text
from infini_ds.model.transformer import InfiniTransformer

_BATCH = 8
_LONGEST_TOKENS = 1 << 30


class AnyQuestion(Protocol):
    """A document up to one of its answers. The questions of a document share its memory."""

    @property
    def prompt(self) -> np.ndarray:
        """Tokens from BOS to just before the answer."""
        ...

    @property
    def before(self) -> int:
        """Number of its tokens, in whole segments, before the segments of the questions."""
        ...

    @property
    def answer(self) -> str:
        """The correct answer."""
        ...

    @property
    def answer_tokens(self) -> int:
        """Number of tokens of the answer, which ends in the segment of its question."""
        ...


Question = TypeVar("Question", bound=AnyQuestion)


def check_lengths(segments: list[int], segment_length: int) -> None:
    """Raises a UserError if documents of so many segments are more than memory holds."""
    if max(segments) * segment_length > _LONGEST_TOKENS:
        raise UserError(
            f"--segments ({max(segments):,}): must be at most "
            f"{_LONGEST_TOKENS // segment_length:,} of this model's, which have "
            f"{segment_length:,} tokens"
        )


def default_samples(segments: int) -> int:
    """Returns the number of documents of a length: 64, and above 512 segments fewer, at least 8."""
    return max(8, min(64, 32768 // segments))


def default_batch(segment_length: int) -> int:
    """Returns how many documents are read together."""
    return max(1, min(_BATCH, CALL_TOKENS // segment_length))


def batches(samples: int, batch: int) -> list[range]:
    """Returns the numbers of the documents that are made together."""
    return [range(begin, min(begin + batch, samples)) for begin in range(0, samples, batch)]


def ask(
    model: InfiniTransformer,
    tokenizer: Tokenizer,
    documents: Sequence[Sequence[Question]],
    progress: QuestionsProgress,
) -> list[tuple[Question, bool, bool]]:
    """Asks the questions of documents, of which those whose questions have equal places are read
    together.

    Args:
        documents: the questions of each document, equally many and in the order of asking.

    Returns:
        Each question, whether its answer was right, and whether it was without the memory.
    """
    outcomes = []
    for _, group in groupby(sorted(documents, key=_places), key=_places):
        alike = list(group)
        right, ablated = (
            _answers_right(model, tokenizer, alike, memory, progress.read)
            for memory in (True, False)
        )
        for document in zip(alike, right, ablated, strict=True):
            outcomes += zip(*document, strict=True)
    progress.answered(len(documents))
    return outcomes


def _places(document: Sequence[AnyQuestion]) -> list[int]:
    return [document[0].before, *(len(question.prompt) for question in document)]


def _answers_right(
    model: InfiniTransformer,
    tokenizer: Tokenizer,
    documents: Sequence[Sequence[AnyQuestion]],
    memory: bool,
    on_read: Callable[[int], None],
) -> list[list[bool]]:
    """Returns for each question of each document whether its answer is right."""
    n, before = model.config.segment_length, documents[0][0].before
    state = None
    if memory:
        read = np.stack([document[0].prompt[:before] for document in documents])
        _, state = read_text(
            model, [torch.from_numpy(read)], None, call_width(n, len(documents)), on_read
        )
    device = next(model.parameters()).device
    right: list[list[bool]] = [[] for _ in documents]
    for asked in zip(*documents, strict=True):
        prompts = np.stack([question.prompt[before:] for question in asked])
        written = model.generate(
            torch.from_numpy(prompts.astype(np.int64)).to(device),
            max_new_tokens=max(question.answer_tokens for question in asked),
            temperature=0.0,
            memory=state,
        )
        for row, question, of_document in zip(written.tolist(), asked, right, strict=True):
            text = tokenizer.decode(row[: question.answer_tokens])
            of_document.append(text == question.answer)
    return right
