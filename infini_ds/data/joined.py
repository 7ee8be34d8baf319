"""Reads several arrays as one, such as the memory-mapped tokens of several stores."""

from collections.abc import Sequence

import numpy as np


class Joined:
    """One-dimensional arrays of one type, read one after another without copying them all."""

    def __init__(self, parts: "Sequence[np.ndarray | Joined]"):
        self.dtype: np.dtype = parts[0].dtype
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self._begins = self._ends - [len(part) for part in parts]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """Copies a slice without a step, or the elements at indices of any shape."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            bounds = zip(self._parts, self._begins, strict=True)
            return np.concatenate(
                [part[max(start - begin, 0) : max(stop - begin, 0)] for part, begin in bounds]
            )
        out = np.empty(index.shape, dtype=self.dtype)
        owners = np.searchsorted(self._ends, index, side="right")
        for owner in np.unique(owners):
            own = owners == owner
            out[own] = self._parts[owner][index[own] - self._begins[owner]]
        return out
