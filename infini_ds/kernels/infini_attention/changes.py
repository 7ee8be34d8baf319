"""The changes that the segments of a window make to the memory, by each rule, in PyTorch."""

from abc import ABC, abstractmethod

from torch import Tensor

from infini_ds.kernels.infini_attention.chunk_walk import chunk_walk
from infini_ds.kernels.infini_attention.scans import map_walk, scan, unchanged, walk
from infini_ds.kernels.infini_attention.segment_overlaps import segment_overlaps
from infini_ds.kernels.infini_attention.segment_sums import segment_sums
from infini_ds.memory.gated_delta import GatedDelta, GatedDeltaDPFP


class Changes(ABC):
    """A segment changes kv by kv <- kv - O kv + B, and norm by norm <- norm + b.

    Args:
        k, v: [batch, segments, n, kv_heads, d].
        weight: [batch, segments, n, kv_heads] fp32, 0 on padding.
    """

    added_norm: Tensor
    """b, [batch, segments, kv_heads, d or 0]."""

    @abstractmethod
    def __init__(self, k: Tensor, v: Tensor, weight: Tensor): ...

    @abstractmethod
    def states(self, kv: Tensor, norm: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the kv that each segment finds, and that after the last segment.

        Args:
            kv: the kv before the window, [batch, kv_heads, f, d].
            norm: the norm that each segment finds, [batch, segments, kv_heads, d or 0].
            starts: [batch, segments].
        """


class RemovingChanges(Changes):
    """The changes of a rule by which kv before a part of a window becomes A kv + B."""

    @abstractmethod
    def maps(self, norm: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the map [B, A] to the kv that each segment finds, [batch, segments, kv_heads, f,
        d + f], and that to the kv after the last segment. The arguments are those of `states`."""


class LinearChanges(Changes):
    """eq. (4), by which O is 0."""

    added_kv: Tensor
    """B, [batch, segments, kv_heads, d, d]."""

    def __init__(self, k: Tensor, v: Tensor, weight: Tensor):
        sums = segment_sums(k, v, weight)
        self.added_kv, self.added_norm = sums.kv, sums.norm

    def states(self, kv: Tensor, norm: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        return scan(self.added_kv, kv, starts)


class DeltaChanges(RemovingChanges):
    """eq. (5)."""

    def __init__(self, k: Tensor, v: Tensor, weight: Tensor):
        sums = segment_sums(k, v, weight)
        self._added_kv, self.added_norm = sums.kv, sums.norm
        self._k, self._weight = k, weight

    def states(self, kv: Tensor, norm: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        return walk(self._added_kv, self._overlaps(norm), kv, starts)

    def maps(self, norm: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        return map_walk(self._added_kv, self._overlaps(norm), starts)

    def _overlaps(self, norm: Tensor) -> Tensor:
        return segment_overlaps(self._k, self._weight, norm, self.added_norm.detach())


class GatedDeltaChanges(RemovingChanges):
    """The gated delta rule, whose maps are a walk from [0, 1]."""

    rule = GatedDelta()

    def __init__(self, k: Tensor, v: Tensor, weight: Tensor):
        self._tokens = k, v, weight
        self.added_norm = weight.new_empty(*k.shape[:2], k.shape[3], 0)

    def states(self, kv: Tensor, norm: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        return chunk_walk(*self._tokens, kv, starts, self.rule)

    def maps(self, norm: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        batch, _, _, kv_heads, d = self._tokens[0].shape
        incoming = unchanged(batch, kv_heads, self.rule.feature_size(d), d, starts.device)
        return chunk_walk(*self._tokens, incoming, starts, self.rule)


class GatedDeltaDPFPChanges(GatedDeltaChanges):
    """The same with more features."""

    rule = GatedDeltaDPFP()


CHANGES: dict[str, type[LinearChanges] | type[RemovingChanges]] = {
    "linear": LinearChanges,
    "delta": DeltaChanges,
    "gated_delta": GatedDeltaChanges,
    "gated_delta_dpfp": GatedDeltaDPFPChanges,
}
"""By the names of the rules, the keys of `memory.RULES`."""
