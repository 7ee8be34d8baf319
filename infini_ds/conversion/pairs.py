"""Pairs tensors of another family with ours in one table that is read in both directions."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Move(NamedTuple):
    """Tensors that are written together, and those they are made from."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    make: Callable[[list[Tensor]], Sequence[Tensor]]
    """Maps the tensors read to those written; on meta tensors it gives shapes and dtypes."""


class Pair(NamedTuple):
    """One of our tensors, and the tensors of the other family that it consists of."""

    ours: str
    theirs: tuple[str, ...]
    join: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]

    def inward(self) -> Move:
        """Returns the move from their tensors to ours."""
        return Move(self.theirs, (self.ours,), lambda tensors: (self.join(tensors),))

    def outward(self) -> Move:
        """Returns the move from our tensor to theirs."""
        return Move((self.ours,), self.theirs, lambda tensors: self.split(tensors[0]))


def same(ours: str, theirs: str) -> Pair:
    """Pairs a tensor with the same one under another name."""
    return Pair(ours, (theirs,), lambda tensors: tensors[0], lambda tensor: (tensor,))


def fused(ours: str, theirs: Sequence[str], rows: Sequence[int]) -> Pair:
    """Pairs our tensor with several of theirs, stacked by rows; `rows` gives the size of each."""
    return Pair(ours, tuple(theirs), torch.cat, lambda tensor: tensor.split(list(rows)))
