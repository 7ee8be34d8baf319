"""The compressive memory of one layer."""

from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-10
"""Least denominator of a read; it matters only where nothing was written."""


class LayerMemory(NamedTuple):
    """What one layer has stored of each lane's document, in fp32."""

    kv: Tensor
    """[batch, kv_heads, d_k, d_v]: M, the sum of sigma(k)^T v."""
    norm: Tensor
    """[batch, kv_heads, d_k]: z, the sum of sigma(k). All zero where nothing was written."""

    @classmethod
    def empty(
        cls, batch: int, kv_heads: int, head_dim: int, device: torch.device | str | None = None
    ) -> "LayerMemory":
        """Memories of documents of which nothing was read yet."""
        return cls(
            torch.zeros(batch, kv_heads, head_dim, head_dim, device=device),
            torch.zeros(batch, kv_heads, head_dim, device=device),
        )
