"""Interleaves the documents of several corpora so that their tokens follow given weights.

Each corpus has its own order and its own clock. Taking a document advances the clock by the
document's tokens divided by the weight of the corpus. The next document always comes from the
corpus whose clock is furthest behind.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from infini_ds.data.document_queue import DocumentQueue, Queue

_AHEAD = 4096
"""Number of documents of each corpus that are ordered at once."""


class MixedQueue(Queue):
    """Endless indices into the documents of several corpora, numbered one corpus after another.

    Args:
        sizes: for each corpus, the tokens of each document, at least 1: int64 [documents].
        weights: for each corpus, its share of the tokens relative to the others, above 0.
        seed: seed for the order within each corpus.
    """

    def __init__(self, sizes: Sequence[np.ndarray], weights: Sequence[float], seed: int):
        self._sizes = sizes
        self._weights = list(weights)
        self._seed = seed
        self._queues = [DocumentQueue(len(size), seed) for size in sizes]
        self._first = np.cumsum([0, *map(len, sizes)])  # index of each corpus's first document
        self._tokens = [0] * len(sizes)  # tokens taken from each corpus
        self._planned = np.empty(0, dtype=np.int64)

    @property
    def epochs(self) -> list[float]:
        """Passes over each corpus so far, counted in documents taken."""
        return self.epochs_without(np.empty(0, dtype=np.int64))

    def epochs_without(self, indices: np.ndarray) -> list[float]:
        """Returns the passes over each corpus so far as if `indices` had not been taken."""
        left = np.bincount(self._corpora(indices), minlength=len(self._sizes)).tolist()
        return [
            queue.epoch + (queue.next - count) / len(size)
            for queue, size, count in zip(self._queues, self._sizes, left, strict=True)
        ]

    def _corpora(self, indices: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first, indices, side="right") - 1

    def rest(self) -> np.ndarray:
        if not len(self._planned):
            self._planned = self._plan()
        return self._planned

    def take_block(self, count: int) -> np.ndarray:
        """Takes the next `count` indices, or as many as there are documents if that is fewer."""
        return self.take(min(count, int(self._first[-1])))

    def _plan(self) -> np.ndarray:
        """Orders the next documents, as far as is certain before one corpus ends its epoch."""
        documents, clocks, ends = [], [], []
        for corpus, queue in enumerate(self._queues):
            ahead = queue.rest()[:_AHEAD]
            tokens = np.cumsum(self._sizes[corpus][ahead])
            # Computed from whole numbers, so that it does not depend on how many are planned ahead.
            clock = (self._tokens[corpus] + np.r_[0, tokens]) / self._weights[corpus]
            documents.append(self._first[corpus] + ahead)
            clocks.append(clock[:-1])
            ends.append(clock[-1])
        clock = np.concatenate(clocks)
        order = np.argsort(clock, kind="stable")
        # Past the clock at which one corpus runs out of ordered documents, nothing is certain.
        certain = np.searchsorted(clock[order], min(ends))
        return np.concatenate(documents)[order[:certain]]

    def advance(self, indices: np.ndarray) -> None:
        self._planned = self._planned[len(indices) :]
        corpora = self._corpora(indices)
        for corpus, queue in enumerate(self._queues):
            own = indices[corpora == corpus] - self._first[corpus]
            queue.advance(own)
            self._tokens[corpus] += int(self._sizes[corpus][own].sum())

    def state(self) -> dict[str, Any]:
        return {
            "queues": [queue.state() for queue in self._queues],
            "weights": self._weights,
            "tokens": list(self._tokens),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from where `state` was taken; all clocks restart if the weights changed."""
        self._planned = np.empty(0, dtype=np.int64)
        for queue, place in zip(self._queues, state["queues"], strict=True):
            queue.load_state(place)
        same = self._weights == state["weights"]
        self._tokens = list(state["tokens"]) if same else [0] * len(self._tokens)

    def as_saved(self, state: dict[str, Any]) -> "MixedQueue":
        if self._weights == state["weights"]:
            former = self
        else:
            former = MixedQueue(self._sizes, state["weights"], self._seed)
        former.load_state(state)
        return former
