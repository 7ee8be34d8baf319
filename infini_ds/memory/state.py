"""The compressive memory of one layer, which is passed on along a document."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

EPSILON = 1e-10
"""Smallest denominator of a read; it matters only where nothing was written."""


@dataclass(frozen=True)
class MemoryState:
    """The memory that one layer has of each lane's document, in fp32.

    Code that passes memories on (lanes, stages, files, windows) treats them as tensors whose first
    dimension is the batch; only memory rules and kernels know what they mean.
    """

    kv: Tensor
    """[batch, kv_heads, d_k, d_v]: M. All zero where nothing was written. In a layer without a
    memory d_k is 0, here and in `norm`."""
    norm: Tensor
    """[batch, kv_heads, d_k]: z, the sum of sigma(k), all zero where nothing was written. By rules
    that do not divide, [batch, kv_heads, 0]."""
    tail: Tensor | None = None
    """[batch, memory.short_conv, heads + 2 kv_heads, d], queries, keys and values of the last
    tokens before the convolution, which no rule knows; None without a convolution."""
    window: Tensor | None = None
    """[batch, segment_length, 2 kv_heads, d], keys and values of the segment before, which no rule
    knows; keys are zero where there is no token. None without model.use_sliding_window. While text
    is generated, it has the type of the model."""

    def __iter__(self) -> Iterator[Tensor]:
        """Goes through the tensors that are there, in the order of the fields."""
        return iter(self.named().values())

    def named(self) -> dict[str, Tensor]:
        """The tensors that are there, by the names of their fields."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def compressed(self) -> "MemoryState":
        """Returns what memory rules know of it."""
        return MemoryState(self.kv, self.norm)

    @classmethod
    def cat(cls, memories: Sequence["MemoryState"]) -> "MemoryState":
        """Concatenates memories along the batch, in order."""
        return memories[0]._with(map(torch.cat, zip(*memories, strict=True)))

    def chunk(self, count: int) -> list["MemoryState"]:
        """Splits a memory into `count` of equal batch size, the inverse of `cat`."""
        parts = (tensor.chunk(count) for tensor in self)
        return [self._with(tensors) for tensors in zip(*parts, strict=True)]

    def mean_norm(self) -> float:
        """Mean Frobenius norm of the memories of all lanes and heads."""
        return float(self.kv.norm(dim=(-2, -1)).mean())

    def map(self, function: Callable[[Tensor], Tensor]) -> "MemoryState":
        """Applies a function to each tensor of the memory."""
        return self._with(map(function, self))

    def cleared(self, lanes: Tensor) -> "MemoryState":
        """Returns the memory with the marked lanes, bool [batch], set to zero."""
        return self.map(lambda tensor: tensor.masked_fill(_beside(lanes, tensor), 0))

    def cleared_where_broken(self) -> "MemoryState":
        """Returns the memory with each lane's head, and each lane's tail and window, set to zero if
        it holds a non-finite number."""
        broken = ~(_finite(self.kv, 2) & _finite(self.norm, 2))
        kv, norm = (x.masked_fill(_beside(broken, x), 0) for x in (self.kv, self.norm))
        tail, window = (
            None if x is None else x.masked_fill(_beside(~_finite(x, 1), x), 0)
            for x in (self.tail, self.window)
        )
        return MemoryState(kv, norm, tail, window)

    def replaced(self, lanes: Tensor, other: "MemoryState") -> "MemoryState":
        """Returns the memory with the marked lanes, bool [batch], taken from another one."""
        pairs = zip(self, other, strict=True)
        return self._with(torch.where(_beside(lanes, old), new, old) for old, new in pairs)

    def _with(self, tensors: Iterable[Tensor]) -> "MemoryState":
        """Returns a memory of other tensors, in the order of those that are there."""
        return replace(self, **dict(zip(self.named(), tensors, strict=True)))


def _finite(tensor: Tensor, dims: int) -> Tensor:
    """Tells what is finite along all dimensions but the first `dims`."""
    return tensor.isfinite().flatten(dims).all(-1)


def _beside(mask: Tensor, tensor: Tensor) -> Tensor:
    """Reshapes a mask of a tensor's first dimensions so that it broadcasts over the tensor."""
    return mask.view(*mask.shape, *[1] * (tensor.dim() - mask.dim()))
