"""Orders the documents: each is taken once per epoch, in a new order every epoch."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np


class Queue(ABC):
    """An endless sequence of document indices."""

    @abstractmethod
    def rest(self) -> np.ndarray:
        """Returns all next indices that are known, without taking them: int64 [1 or more]."""

    @abstractmethod
    def advance(self, indices: np.ndarray) -> None:
        """Takes `indices`, which must be the first ones that `rest` returns."""

    @abstractmethod
    def state(self) -> Any:
        """Returns the position in the sequence as JSON values."""

    @abstractmethod
    def load_state(self, state: Any) -> None:
        """Continues from where `state` was taken."""

    def as_saved(self, state: Any) -> "Queue":
        """Returns a queue that goes on as the saved one would have, whatever this one's settings.

        It may be this queue; if not, this one is left as it was.
        """
        self.load_state(state)
        return self

    def take(self, count: int) -> np.ndarray:
        """Takes the next `count` indices: int64 [count]."""
        parts = [np.empty(0, dtype=np.int64)]
        while count:
            part = self.rest()[:count]
            self.advance(part)
            count -= len(part)
            parts.append(part)
        return np.concatenate(parts)

    def take_block(self, count: int) -> np.ndarray:
        """Takes the next `count` indices, or fewer where an epoch has fewer."""
        return self.take(count)


class DocumentQueue(Queue):
    """Repeats the indices 0 to count - 1 in a new order each epoch. Its state is [epoch, next].

    Attributes:
        epoch: number of complete passes before the current one.
        next: indices already taken in this epoch.

    Args:
        count: number of documents, at least 1.
        key: integers that identify this queue's order, such as a seed; they may be negative.
    """

    def __init__(self, count: int, *key: int):
        self._count = count
        self._key = [number & (2**64 - 1) for number in key]
        self._go_to(0, 0)

    def _go_to(self, epoch: int, taken: int) -> None:
        self.epoch, self.next = epoch, taken
        # NumPy keeps the raw stream of a bit generator stable for good, but not `permutation`.
        source = np.random.Philox(np.random.SeedSequence([*self._key, epoch]))
        self._order = np.argsort(source.random_raw(self._count), kind="stable")

    def rest(self) -> np.ndarray:
        """Returns what is left of this epoch, or all of the next one if nothing is left."""
        if self.next == self._count:
            self._go_to(self.epoch + 1, 0)
        return self._order[self.next :]

    def advance(self, indices: np.ndarray) -> None:
        self.next += len(indices)

    def take_block(self, count: int) -> np.ndarray:
        """Takes the next `count` indices, or what is left of this epoch if that is fewer."""
        block = self.rest()[:count]
        self.advance(block)
        return block

    def state(self) -> list[int]:
        return [self.epoch, self.next]

    def load_state(self, state: list[int]) -> None:
        self._go_to(*state)
