"""The rows of a window in which a read of the memory is mixed with local attention, by parts.

A part has some segments s and key-value heads h, with g query heads for each.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from infini_ds.kernels.infini_attention.segment_sums import Part, parts
from infini_ds.layout import Layout, memory_tokens
from infini_ds.system.ranges import compute_dtype


class Readers(NamedTuple):
    """Which tokens of packed segments read the memory, segments flattened."""

    tokens: Tensor
    """[segments, n] bool."""
    rows: list[int]
    """Of each segment, how many rows from the first on to work on."""

    @classmethod
    def of(cls, layout: Layout | None, n: int) -> "Readers | None":
        """Finds them; None stands for all tokens."""
        if layout is None or layout.begins is None:
            return None
        tokens = memory_tokens(layout, n).flatten(0, 1)
        if tokens.device.type != "cpu":  # nothing waits for a device
            return cls(tokens, [n] * len(tokens))
        # The memory is empty where a document starts.
        return cls(tokens, layout.lengths.masked_fill(layout.starts, 0).flatten().tolist())


def mixed_rows(
    q: Tensor, kv: Tensor, gate: Tensor, readers: Readers | None
) -> Iterator["MixedRows"]:
    """All parts in which a token reads.

    Args:
        q: [segments, n, heads, d].
        kv: [segments, kv_heads, f, d].
        gate: [segments, heads] fp32, 0 where nothing is stored.
    """
    segments, n = q.shape[:2]
    kv_heads, features = kv.shape[1:3]
    for part in parts(segments, n, kv_heads, features, q.device):
        if readers is None:
            yield MixedRows(part, q, kv_heads, gate, None)
        elif rows := max(readers.rows[part.segments]):
            yield MixedRows(part, q, kv_heads, gate, readers.tokens[part.segments, :rows])


class MixedRows:
    """The rows of one part.

    With `readers` [segments, rows] bool, only the first rows of segments, and the gate of those
    that do not read is 0.
    """

    def __init__(self, part: Part, q: Tensor, kv_heads: int, gate: Tensor, readers: Tensor | None):
        self.part = part
        self.dtype = compute_dtype(q.dtype)
        self._group = q.shape[2] // kv_heads
        self.gate = self.per_head(gate)[..., None, None]
        self._readers = None
        self._end = None
        if readers is not None:
            self._end = readers.shape[1]
            self._readers = readers[:, None, None, :, None].float()  # [s, 1, 1, n, 1]
            self.gate = self.gate * self._readers

    def of(self, x: Tensor) -> Tensor:
        """Views this part of x [segments, n, heads, d] as [s, h, g, n, d]."""
        own = x.unflatten(2, (-1, self._group))[self.part.segments, : self._end, self.part.heads]
        return rearrange(own, "s n h g d -> s h g n d")

    def per_head(self, x: Tensor) -> Tensor:
        """Views this part of x [segments, heads] as [s, h, g]."""
        return x.unflatten(1, (-1, self._group))[self.part]

    def gate_gradient(self, along_read: Tensor, along_local: Tensor) -> Tensor:
        """What the gate's change does, along the read [s, h, g, n, 1] and a_dot [s, h, g, n, d]."""
        if self._readers is None:
            local = along_local.sum(dim=(-2, -1), dtype=torch.float32)
            return along_read.sum(dim=(-2, -1)) - local
        local = along_local.sum(dim=-1, keepdim=True, dtype=torch.float32)
        return ((along_read - local) * self._readers).sum(dim=(-2, -1))


def joined(x: Tensor) -> Tensor:
    """Joins the rows of a group's queries, [s, h, g, n, d] to [s, h, g n, d]."""
    return x.flatten(2, 3)
