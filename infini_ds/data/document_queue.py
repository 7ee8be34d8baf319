"""The order in which documents are taken: each once an epoch, in a new order every epoch."""

import numpy as np


class DocumentQueue:
    """Endless indices 0 to count - 1. Where it stands is (epoch, next).

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
        self.go_to(0, 0)

    def go_to(self, epoch: int, taken: int) -> None:
        """Goes to where `taken` indices of an epoch are taken."""
        self.epoch, self.next = epoch, taken
        # NumPy promises the raw stream of a bit generator for good, but not that of `permutation`.
        source = np.random.Philox(np.random.SeedSequence([*self._key, epoch]))
        self._order = np.argsort(source.random_raw(self._count), kind="stable")

    def rest(self) -> np.ndarray:
        """Those left of this epoch, or all of the next one where none is left: int64 [1 or more].

        They are not taken by this.
        """
        if self.next == self._count:
            self.go_to(self.epoch + 1, 0)
        return self._order[self.next :]

    def take(self, count: int) -> np.ndarray:
        """The next `count` indices: int64 [count]."""
        parts = []
        while count:
            part = self.rest()[:count]
            self.next += len(part)
            count -= len(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
