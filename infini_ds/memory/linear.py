"""The paper's first rule, which adds a segment's keys and values to the memory."""

import torch
from torch import Tensor

from infini_ds.memory.rule import DividingRule
from infini_ds.memory.state import MemoryState


class Linear(DividingRule):
    """eq. (4): M' = M + (w sigma(k))^T v and z' = z + sum of w sigma(k); A is the identity."""

    name = "linear"

    def write(
        self, memory: MemoryState, features: Tensor, weight: Tensor, values: Tensor
    ) -> MemoryState:
        return added(memory, features * weight[..., None], values)

    def write_flops(self, head_dim: int, n: int) -> int:
        """The product of a key and a value."""
        return 2 * head_dim**2

    def handed_on(self, kv_heads: int, head_dim: int) -> int:
        """A of M and z is one number for all heads; B has the shapes of M and z."""
        return 1 + kv_heads * head_dim * (head_dim + 1)

    def map_flops(self, head_dim: int, n: int, segments: int, ranks: int) -> int:
        """A part's B is a weighted sum over its segments; applying it adds no products."""
        return 2 * segments * head_dim * (head_dim + 1)


def added(memory: MemoryState, weighted_k: Tensor, values: Tensor) -> MemoryState:
    """Returns the memory with values added at their keys."""
    kv = memory.kv + torch.einsum("b n h k, b n h v -> b h k v", weighted_k, values)
    return MemoryState(kv, memory.norm + weighted_k.sum(dim=1))
