"""The contract of a memory rule, which says how a segment changes the memory."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from infini_ds.memory.state import EPSILON, MemoryState


class MemoryRule(ABC):
    """Writes a segment into the memory; each rule has a file beside this one.

    A rule is an affine map of the state, S <- A S + B, where A and B depend only on the segment.
    `kernels.infini_attention` has a fast implementation beside each rule, which computes all
    segments of a window at once and agrees with `read` and `write` in results and gradients.
    """

    name: ClassVar[str]
    """Value of model.memory_rule that selects the rule."""
    divides: ClassVar[bool]
    """Whether reads are divided by z, which is part of the state then."""

    def specs(self, kv_heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of one lane's tensors by their names in `MemoryState`."""
        return {
            "kv": (kv_heads, self.feature_size(head_dim), head_dim),
            "norm": (kv_heads, self.feature_size(head_dim) if self.divides else 0),
        }

    def feature_size(self, head_dim: int) -> int:
        """Returns f, how many features a query or key of head_dim channels has."""
        return head_dim

    def empty(
        self, batch: int, kv_heads: int, head_dim: int, device: torch.device | str | None = None
    ) -> MemoryState:
        """Makes the memories of documents of which nothing has been read yet."""
        shapes = self.specs(kv_heads, head_dim).values()
        return MemoryState(*(torch.zeros(batch, *shape, device=device) for shape in shapes))

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Maps queries and keys [..., d] to the features [..., f] with which they read and
        write."""

    @abstractmethod
    def read(self, features: Tensor, memory: MemoryState) -> Tensor:
        """Reads the memory for some queries.

        Args:
            features: [batch, n, heads, f], of the queries; those of a group read one memory.

        Returns:
            [batch, n, heads, d].
        """

    @abstractmethod
    def written(self, memory: MemoryState) -> Tensor:
        """Tells whether anything is stored, bool [batch, kv_heads]."""

    @abstractmethod
    def write(
        self, memory: MemoryState, features: Tensor, weight: Tensor, values: Tensor
    ) -> MemoryState:
        """Returns the memory after a segment. This is the specification that kernels must match.

        Args:
            memory: the memory before the segment.
            features: [batch, n, kv_heads, f], of the keys.
            weight: [batch, n, kv_heads], the write weights, 0 on padding.
            values: [batch, n, kv_heads, d].
        """

    @abstractmethod
    def write_flops(self, head_dim: int, n: int) -> int:
        """Counts the operations with which a key-value head writes a token, forward.

        Those with z, if there is one, are not included.

        Args:
            n: tokens of a segment.
        """

    @abstractmethod
    def handed_on(self, kv_heads: int, head_dim: int) -> int:
        """Returns how many numbers each of the ranks that share a window tells the others about its
        part's change of a lane's memory; see `HandOn`."""

    def map_flops(self, head_dim: int, n: int, segments: int, ranks: int) -> int:
        """Counts a rank's operations on the maps of a window that it shares, forward, for one
        key-value head of a lane: the map of its own part, and then those of all parts applied.

        If A is a matrix, each segment multiplies a map of 2 d columns by a matrix [d, d], and each
        part's A multiplies the memory once. Sums over tokens are not included.

        Args:
            n: length of a segment.
            segments: number of segments in the rank's part.
            ranks: number of ranks that share the window.
        """
        return 2 * head_dim**3 * (2 * segments + ranks)


class DividingRule(MemoryRule):
    """The part that the paper's rules share: sigma, and the read of eq. (3), divided by z."""

    divides = True

    def features(self, x: Tensor) -> Tensor:
        return sigma(x)

    def read(self, features: Tensor, memory: MemoryState) -> Tensor:
        kv, norm = memory.map(lambda tensor: of_each_query(tensor, features.shape[2]))
        numerator = torch.einsum("b n h k, b h k v -> b n h v", features, kv)
        denominator = torch.einsum("b n h k, b h k -> b n h", features, norm)
        return numerator / denominator.clamp(min=EPSILON)[..., None]

    def written(self, memory: MemoryState) -> Tensor:
        return memory.norm.sum(-1) > 0


def sigma(x: Tensor) -> Tensor:
    """Maps queries and keys to features by elu + 1, which is always positive."""
    return torch.nn.functional.elu(x) + 1


def of_each_query(state: Tensor, heads: int) -> Tensor:
    """Repeats what key-value heads have, [batch, kv_heads, ...], for each of the query heads."""
    return state.repeat_interleave(heads // state.shape[1], dim=1)
