"""The contract of a memory rule, which says how a segment changes the memory."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from infini_ds.memory.state import EPSILON, MemoryState


class MemoryRule(ABC):
    """Writes a segment into the memory; each rule has a file beside this one.

    A rule is an affine map of the state, S <- A S + B, where A and B depend only on the segment.
    `kernels.infini_attention` picks a fast implementation by the rule's name, which computes all
    segments of a window at once and agrees with `write` in results and gradients.
    """

    name: ClassVar[str]
    """Value of model.memory_rule that selects the rule."""
    reads_of_a_key: ClassVar[int]
    """Number of times that writing a key reads the memory, for counting operations."""

    @abstractmethod
    def write(
        self, memory: MemoryState, sigma_k: Tensor, weighted_k: Tensor, values: Tensor
    ) -> MemoryState:
        """Returns the memory after a segment. This is the specification that kernels must match.

        Args:
            memory: the memory before the segment.
            sigma_k: [batch, n, kv_heads, d], features of the keys.
            weighted_k: [batch, n, kv_heads, d], the features times the write weights.
            values: [batch, n, kv_heads, d].
        """

    @abstractmethod
    def handed_on(self, kv_heads: int, head_dim: int) -> int:
        """Returns how many numbers each of the ranks that share a window tells the others about its
        part's change of a lane's memory; see `HandOn`."""

    @abstractmethod
    def map_flops(self, head_dim: int, segments: int, ranks: int) -> int:
        """Counts a rank's operations on the maps of a window that it shares, forward, for one
        key-value head of a lane: the map of its own part, and then those of all parts applied.

        Sums over tokens are not included.

        Args:
            segments: number of segments in the rank's part.
            ranks: number of ranks that share the window.
        """


def sigma(x: Tensor) -> Tensor:
    """Maps queries and keys to features by elu + 1, which is always positive."""
    return torch.nn.functional.elu(x) + 1


def read(sigma_q: Tensor, memory: MemoryState) -> Tensor:
    """Reads the memory for some queries, eq. (3).

    Args:
        sigma_q: [batch, n, heads, d], features of the queries; those of a group read one memory.

    Returns:
        [batch, n, heads, d].
    """
    group = sigma_q.shape[2] // memory.norm.shape[1]
    kv, norm = memory.map(lambda tensor: tensor.repeat_interleave(group, dim=1))
    numerator = torch.einsum("b n h k, b h k v -> b n h v", sigma_q, kv)
    denominator = torch.einsum("b n h k, b h k -> b n h", sigma_q, norm)
    return numerator / denominator.clamp(min=EPSILON)[..., None]
