"""The changes that the segments of a window make to the memory, by each rule, in PyTorch."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from infini_ds.kernels.infini_attention.segment_maps import segment_maps
from infini_ds.kernels.infini_attention.segment_overlaps import segment_overlaps
from infini_ds.kernels.infini_attention.segment_sums import segment_sums
from infini_ds.memory.state import MemoryState


class Changes(ABC):
    """A segment changes kv by kv <- kv - O kv + B, and norm by norm <- norm + b.

    Args:
        k, v: [batch, segments, n, kv_heads, d].
        weight: [batch, segments, n, kv_heads] fp32, 0 on padding.
    """

    removes: ClassVar[bool]
    """Whether O is other than 0."""
    added: MemoryState
    """B [batch, segments, kv_heads, d, d] and b [batch, segments, kv_heads, d or 0]."""

    @abstractmethod
    def __init__(self, k: Tensor, v: Tensor, weight: Tensor): ...

    def overlaps(self, norm: Tensor) -> Tensor:
        """Returns O, [batch, segments, kv_heads, d, d], of a rule that removes.

        Args:
            norm: the norm before each segment, [batch, segments, kv_heads, d or 0].
        """
        raise NotImplementedError


class LinearChanges(Changes):
    """eq. (4)."""

    removes = False

    def __init__(self, k: Tensor, v: Tensor, weight: Tensor):
        self.added = segment_sums(k, v, weight)


class DeltaChanges(Changes):
    """eq. (5)."""

    removes = True

    def __init__(self, k: Tensor, v: Tensor, weight: Tensor):
        self.added = segment_sums(k, v, weight)
        self._k, self._weight = k, weight

    def overlaps(self, norm: Tensor) -> Tensor:
        return segment_overlaps(self._k, self._weight, norm, self.added.norm.detach())


class GatedDeltaChanges(Changes):
    """The gated delta rule."""

    removes = True

    def __init__(self, k: Tensor, v: Tensor, weight: Tensor):
        self._overlaps, added = segment_maps(k, v, weight)
        self.added = MemoryState(added, added.new_empty(*added.shape[:3], 0))

    def overlaps(self, norm: Tensor) -> Tensor:
        return self._overlaps


CHANGES: dict[str, type[Changes]] = {
    "linear": LinearChanges,
    "delta": DeltaChanges,
    "gated_delta": GatedDeltaChanges,
}
"""By the names of the rules, the keys of `memory.RULES`."""
