"""The order in which documents are taken: each once an epoch, in a new order every epoch."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np


class Queue(ABC):
    """Endless indices of documents."""

    @abstractmethod
    def rest(self) -> np.ndarray:
        """The next ones, as many as are at hand: int64 [1 or more]. They are not taken by this."""

    @abstractmethod
    def advance(self, indices: np.ndarray) -> None:
        """Takes indices that `rest` began with."""

    @abstractmethod
    def state(self) -> Any:
        """Where it stands, as JSON values."""

    @abstractmethod
    def load_state(self, state: Any) -> None:
        """Goes on where `state` was taken."""

    def take(self, count: int) -> np.ndarray:
        """The next `count` indices: int64 [count]."""
        parts = [np.empty(0, dtype=np.int64)]
        while count:
            part = self.rest()[:count]
            self.advance(part)
            count -= len(part)
            parts.append(part)
        return np.concatenate(parts)


class DocumentQueue(Queue):
    """Indices 0 to count - 1 over and over. Where it stands is [epoch, next].

    Attributes:
        epoch: passes that are complete, or under way.
        next: indices taken in this epoch.

    Args:
        count: number of documents, at least 1.
        key: integers that name this queue's order, such as a seed; negative ones too.
    """

    def __init__(self, count: int, *key: int):
        self._count = count
        self._key = [number & (2**64 - 1) for number in key]
        self._go_to(0, 0)

    def _go_to(self, epoch: int, taken: int) -> None:
        self.epoch, self.next = epoch, taken
        # NumPy promises the raw stream of a bit generator for good, but not that of `permutation`.
        source = np.random.Philox(np.random.SeedSequence([*self._key, epoch]))
        self._order = np.argsort(source.random_raw(self._count), kind="stable")

    def rest(self) -> np.ndarray:
        """Those left of this epoch, or all of the next one where none is left."""
        if self.next == self._count:
            self._go_to(self.epoch + 1, 0)
        return self._order[self.next :]

    def advance(self, indices: np.ndarray) -> None:
        self.next += len(indices)

    def state(self) -> list[int]:
        return [self.epoch, self.next]

    def load_state(self, state: list[int]) -> None:
        self._go_to(*state)
