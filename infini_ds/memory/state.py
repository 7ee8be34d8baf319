"""The compressive memory of one layer: what is handed on along a document."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-10
"""Least denominator of a read; it matters only where nothing was written."""


class MemoryState(NamedTuple):
    """What one layer has stored of each lane's document, in fp32.

    Whatever hands memories on (lanes, stages, files, windows) treats it as some tensors whose first
    dimension is the batch; memory rules and kernels alone know what they mean.
    """

    kv: Tensor
    """[batch, kv_heads, d_k, d_v]: M, the sum of sigma(k)^T v."""
    norm: Tensor
    """[batch, kv_heads, d_k]: z, the sum of sigma(k). All zero where nothing was written."""

    @classmethod
    def specs(cls, kv_heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of one lane, by their names."""
        return {"kv": (kv_heads, head_dim, head_dim), "norm": (kv_heads, head_dim)}

    @classmethod
    def empty(
        cls, batch: int, kv_heads: int, head_dim: int, device: torch.device | str | None = None
    ) -> "MemoryState":
        """Memories of documents of which nothing was read yet."""
        shapes = cls.specs(kv_heads, head_dim).values()
        return cls(*(torch.zeros(batch, *shape, device=device) for shape in shapes))

    @classmethod
    def cat(cls, memories: Sequence["MemoryState"]) -> "MemoryState":
        """One memory whose batch is that of all of them, in order."""
        return cls(*map(torch.cat, zip(*memories, strict=True)))

    @classmethod
    def stack(cls, memories: Sequence["MemoryState"]) -> "MemoryState":
        """The memories along a new first dimension."""
        return cls(*map(torch.stack, zip(*memories, strict=True)))

    def unstack(self) -> list["MemoryState"]:
        """The inverse of `stack`."""
        return [MemoryState(*tensors) for tensors in zip(*self, strict=True)]

    def chunk(self, count: int) -> list["MemoryState"]:
        """The inverse of `cat`, of `count` memories of equal batches."""
        parts = (tensor.chunk(count) for tensor in self)
        return [MemoryState(*tensors) for tensors in zip(*parts, strict=True)]

    def mean_norm(self) -> float:
        """Mean Frobenius norm of the memories of all lanes and heads."""
        return float(self.kv.norm(dim=(-2, -1)).mean())

    def map(self, function: Callable[[Tensor], Tensor]) -> "MemoryState":
        """The memory with each tensor changed by a function."""
        return MemoryState(*map(function, self))

    def cleared(self, lanes: Tensor) -> "MemoryState":
        """The memory without the documents of marked lanes, bool [batch]."""
        return self.map(lambda tensor: tensor.masked_fill(_beside(lanes, tensor), 0))

    def cleared_where_broken(self) -> "MemoryState":
        """The memory without the heads of lanes that hold a number that is not finite."""
        fine = torch.stack([tensor.isfinite().flatten(2).all(-1) for tensor in self]).all(0)
        return self.map(lambda tensor: tensor.masked_fill(_beside(~fine, tensor), 0))

    def replaced(self, lanes: Tensor, other: "MemoryState") -> "MemoryState":
        """The memory with the marked lanes, bool [batch], of another one."""
        pairs = zip(self, other, strict=True)
        return MemoryState(*(torch.where(_beside(lanes, old), new, old) for old, new in pairs))


def _beside(mask: Tensor, tensor: Tensor) -> Tensor:
    """A mask of a tensor's first dimensions, which fits beside the tensor."""
    return mask.view(*mask.shape, *[1] * (tensor.dim() - mask.dim()))
