"""What a memory rule is: how a segment changes the memory."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from infini_ds.memory.state import EPSILON, MemoryState


class MemoryRule(ABC):
    """How a segment is written into the memory; a file beside this one for each rule.

    A rule is an affine map of the state, S <- A S + B, with A and B from the segment alone. What
    computes it fast, with all segments of a window at once, is chosen by its name in
    `kernels.infini_attention`, and agrees with `write` on results and gradients.
    """

    name: ClassVar[str]
    """model.memory_rule"""
    reads_of_a_key: ClassVar[int]
    """How many times a key reads the memory before it is written, to count operations."""

    @abstractmethod
    def write(
        self, memory: MemoryState, sigma_k: Tensor, weighted_k: Tensor, values: Tensor
    ) -> MemoryState:
        """The memory after a segment: the specification.

        Args:
            memory: before the segment.
            sigma_k: [batch, n, kv_heads, d], features of the keys.
            weighted_k: [batch, n, kv_heads, d], the same times the write weights.
            values: [batch, n, kv_heads, d].
        """


def sigma(x: Tensor) -> Tensor:
    """The feature map of queries and keys: elu + 1, always positive."""
    return torch.nn.functional.elu(x) + 1


def read(sigma_q: Tensor, memory: MemoryState) -> Tensor:
    """What the memory holds for some queries, eq. (3).

    Args:
        sigma_q: [batch, n, heads, d], features; the queries of a group read one memory.

    Returns:
        [batch, n, heads, d].
    """
    group = sigma_q.shape[2] // memory.norm.shape[1]
    kv, norm = memory.map(lambda tensor: tensor.repeat_interleave(group, dim=1))
    numerator = torch.einsum("b n h k, b h k v -> b n h v", sigma_q, kv)
    denominator = torch.einsum("b n h k, b h k -> b n h", sigma_q, norm)
    return numerator / denominator.clamp(min=EPSILON)[..., None]
