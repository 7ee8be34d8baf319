"""Multi-query associative recall: which values does a model find, how many segments later?

The documents of a cell (a number of pairs and a distance) are read window by window with a memory
of constant size. A larger distance goes on where the one before ended: the pairs are read once, and
at each distance all keys are asked of a copy of the memory. With its memory ablated, the model
reads the questions alone, which gives the level of guessing.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from infini_ds.data.recall import (
    EVALUATION,
    Documents,
    Size,
    draw_documents,
    draw_filler,
    recall_random,
)
from infini_ds.layout import IGNORE_INDEX
from infini_ds.model.reading import CALL_TOKENS, Reader, call_width, read_text
from infini_ds.model.transformer import InfiniTransformer

WHOLE_TOKENS = 4096
"""Longest document that is read with attention over all of it, whose cost grows with the square."""
_FILLER_SEGMENTS = _NEAR_SEGMENTS = 64
_BATCH = 8


class Questions(NamedTuple):
    """What an evaluation asks."""

    pairs: Sequence[int]
    """Numbers of pairs in a document."""
    distances: Sequence[int]
    """Numbers of segments between pairs and questions."""
    documents: int
    """Number of documents in each cell."""
    keys: int
    """Number of different keys, and of values."""
    segment_length: int
    """Tokens of the documents' segments."""

    def sizes(self) -> list[Size]:
        """Returns the size of the documents with each number of pairs."""
        return [Size(pairs, self.segment_length, self.keys) for pairs in self.pairs]

    def documents_at(self, distance: int) -> int:
        """Returns the documents of a cell: beyond 64 segments a quarter, in batches of 8."""
        few = max(1, self.documents // 4 // _BATCH) * _BATCH
        return self.documents if distance <= _NEAR_SEGMENTS else min(few, self.documents)


def tokens_to_read(questions: Questions, whole: bool) -> int:
    """Returns how many tokens `measure`, or `measure_whole`, reads, questions included."""
    if whole:
        return sum(
            questions.documents_at(distance) * size.tokens(distance)
            for size in questions.sizes()
            for distance in _that_fit(size, questions)
        )
    read = 0
    for size in questions.sizes():
        asked = questions.documents  # once ablated
        before = 0
        for distance in sorted(questions.distances):
            asked += questions.documents_at(distance)
            read += questions.documents_at(distance) * (distance - before)
            before = distance
        read += questions.documents * size.stating_segments + asked * size.asking_segments
    return questions.segment_length * read


@torch.no_grad()
def measure(
    model: Reader, questions: Questions, on_read: Callable[[int], None]
) -> dict[str, list[dict[str, Any]]]:
    """Asks a model with a memory.

    Args:
        model: a model in evaluation mode whose segments have the questions' length.
        on_read: called with the number of tokens just read.

    Returns:
        "cells", a list of the pairs, distance, answers, right answers and accuracy of each cell,
        and "ablated", the same by pairs alone with an empty memory.

    Raises:
        RunError: what the model computes from the text is not finite.
    """
    cells, ablated = [], []
    for size in questions.sizes():
        right, without = dict.fromkeys(sorted(questions.distances), 0), 0
        for begin, count in _batches(questions.documents, _BATCH):
            random = recall_random(EVALUATION, size.pairs, begin)
            documents = draw_documents(random, size, count)
            memory, read = None, 0
            pieces = [torch.from_numpy(documents.stated)]
            for distance in right:
                if begin >= questions.documents_at(distance):
                    continue
                pieces += _filler(random, count, distance - read, questions.segment_length)
                if pieces:
                    width = call_width(questions.segment_length, count)
                    _, memory = read_text(model, pieces, memory, width, on_read)
                pieces, read = [], distance
                right[distance] += _right(model, documents, memory)
                on_read(documents.asked.size)
            without += _right(model, documents, None)
            on_read(documents.asked.size)
        cells += [
            _cell(size, right[each], questions.documents_at(each), distance=each)
            for each in questions.distances
        ]
        ablated.append(_cell(size, without, questions.documents))
    return {"cells": cells, "ablated": ablated}


@torch.no_grad()
def measure_whole(
    model: InfiniTransformer, questions: Questions, on_read: Callable[[int], None]
) -> dict[str, list[dict[str, Any]]]:
    """Asks a model that attends to whole documents, of at most WHOLE_TOKENS tokens.

    The weights are taken as they are; only the segment grows to the length of the document.
    Arguments and results are those of `measure`; longer documents have no cell.
    """
    cells = []
    for size in questions.sizes():
        for distance in _that_fit(size, questions):
            length, right = size.tokens(distance), 0
            grown = with_segment_length(model, length)
            documents_here = questions.documents_at(distance)
            for begin, count in _batches(documents_here, max(1, CALL_TOKENS // length)):
                random = recall_random(EVALUATION, size.pairs, begin)
                documents = draw_documents(random, size, count)
                filler = draw_filler(random, count, distance * size.segment_length)
                before = np.concatenate((documents.stated, filler), axis=1)
                right += _right(grown, documents, None, before)
                on_read(count * length)
            cells.append(_cell(size, right, documents_here, distance=distance))
    return {"cells": cells, "ablated": []}


def with_segment_length(model: InfiniTransformer, length: int) -> InfiniTransformer:
    """Returns a model with the same weights and segments of another length, to be read with."""
    config = model.config.model_copy(update={"segment_length": length})
    with torch.device("meta"):
        other = InfiniTransformer(config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval()


def _right(
    model: Reader, documents: Documents, memory: Any, before: np.ndarray | None = None
) -> int:
    """Counts the right answers after a memory, or after tokens `before` the questions."""
    device = next(iter(model.parameters())).device
    asked = documents.asked
    tokens = asked if before is None else np.concatenate((before, asked), axis=1)
    hidden, _ = model.read(torch.from_numpy(tokens).to(device), memory)
    labels = torch.from_numpy(documents.labels).to(device)
    answers = labels != IGNORE_INDEX
    found = model.logits(hidden[:, -labels.shape[1] :][answers]).argmax(dim=-1)
    return int((found == labels[answers]).sum())


def _that_fit(size: Size, questions: Questions) -> list[int]:
    return [each for each in questions.distances if size.tokens(each) <= WHOLE_TOKENS]


def _batches(documents: int, batch: int) -> Iterator[tuple[int, int]]:
    """Yields the first document and the number of documents of each batch."""
    for begin in range(0, documents, batch):
        yield begin, min(batch, documents - begin)


def _filler(random: np.random.Generator, count: int, segments: int, n: int) -> Iterator[Tensor]:
    for begin in range(0, segments, _FILLER_SEGMENTS):
        width = min(_FILLER_SEGMENTS, segments - begin) * n
        yield torch.from_numpy(draw_filler(random, count, width))


def _cell(size: Size, right: int, documents: int, **where: int) -> dict[str, Any]:
    answers = documents * size.pairs
    return {
        "pairs": size.pairs, **where, "right": right, "answers": answers,
        "accuracy": right / answers,
    }  # fmt: skip
