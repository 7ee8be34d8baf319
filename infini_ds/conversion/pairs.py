"""How tensors of another family and ours correspond: one table, read in both directions."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Move(NamedTuple):
    """Tensors that are written together, and those they are made of."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    make: Callable[[list[Tensor]], Sequence[Tensor]]
    """What is read to what is written; on meta tensors it gives shapes and dtypes."""


class Pair(NamedTuple):
    """A tensor of ours, and the tensors of the other family that it consists of."""

    ours: str
    theirs: tuple[str, ...]
    join: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]

    def inward(self) -> Move:
        """From theirs to ours."""
        return Move(self.theirs, (self.ours,), lambda tensors: (self.join(tensors),))

    def outward(self) -> Move:
        """From ours to theirs."""
        return Move((self.ours,), self.theirs, lambda tensors: self.split(tensors[0]))


def same(ours: str, theirs: str) -> Pair:
    """The same tensor under another name."""
    return Pair(ours, (theirs,), lambda tensors: tensors[0], lambda tensor: (tensor,))


def fused(ours: str, theirs: Sequence[str], rows: Sequence[int]) -> Pair:
    """Tensors that lie below one another in ours, each of so many rows."""
    return Pair(ours, tuple(theirs), torch.cat, lambda tensor: tensor.split(list(rows)))
