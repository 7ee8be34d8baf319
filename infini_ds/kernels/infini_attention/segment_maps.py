"""The gated delta rule, see `memory.gated_delta`, as one affine map per segment.

With K, V and w a segment's keys, values and write weights, each token in turn changes the memory by
M <- M - w k^T (k M - v). All tokens together change it by M <- M - O M + B, where

    [O, B] = K^T T [K, V],   T = (I + tril(diag(w) K K^T, -1))^-1 diag(w)

Triangular systems are solved for CHUNK tokens at a time, and the maps of a segment's chunks are
composed. Nothing but the inputs is kept for the backward pass.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from infini_ds.kernels.infini_attention.segment_sums import Part, parts, rows_of
from infini_ds.memory.gated_delta import CHUNK, KEY_EPSILON


def segment_maps(k: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Computes O and B of each segment in fp32.

    Args:
        k, v: [batch, segments, n, kv_heads, d].
        weight: [batch, segments, n, kv_heads] fp32, 0 on padding.

    Returns:
        O and B, each [batch, segments, kv_heads, d, d].
    """
    flat = (x.flatten(0, 1) for x in (k, v, weight))
    maps: Tensor = _SegmentMaps.apply(*flat)  # type: ignore[assignment]
    overlaps, added = maps.unflatten(0, k.shape[:2]).chunk(2, dim=-1)
    return overlaps, added


class UnitKeys(NamedTuple):
    """Features of the gated delta rule, in fp32, and what their gradient needs."""

    keys: Tensor
    """[..., d]: x over its length."""
    scale: Tensor
    """[..., 1]: one over the length."""

    @classmethod
    def of(cls, x: Tensor) -> "UnitKeys":
        """Computes the features of queries or keys [..., d]."""
        x = x.float()
        scale = torch.linalg.vecdot(x, x)[..., None].add_(KEY_EPSILON).rsqrt_()
        return cls(x * scale, scale)

    def gradient(self, d_keys: Tensor) -> Tensor:
        """Returns the gradient of x from that of the features."""
        along = torch.linalg.vecdot(self.keys, d_keys)[..., None]
        return torch.addcmul(d_keys, self.keys, along, value=-1).mul_(self.scale)


class _SegmentMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, v, weight):
        ctx.save_for_backward(k, v, weight)
        segments, n, kv_heads, d = k.shape
        maps = torch.empty(segments, kv_heads, d, 2 * d, device=k.device)
        for part in parts(segments, n, kv_heads, d, k.device):
            maps[part] = _composed(_Chunks(part, k, v, weight).maps)[-1]
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx, d_maps):
        k, v, weight = ctx.saved_tensors
        segments, n, kv_heads, d = k.shape
        gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v, weight)]
        dk, dv, d_weight = gradients
        for part in parts(segments, n, kv_heads, d, k.device):
            chunks = _Chunks(part, k, v, weight)
            found = chunks.gradients(_composed_back(chunks.maps, d_maps[part]))
            for x, own in zip((dk, dv, d_weight[..., None]), found, strict=True):
                rows_of(x, part).copy_(own.flatten(2, 3)[:, :, :n])
        return dk, dv, d_weight if ctx.needs_input_grad[2] else None


def _composed(maps: Tensor) -> list[Tensor]:
    """Composes the maps of chunks [s, h, c, d, 2 d] to those up to the end of each, [s, h, d, 2 d]:
    with a chunk's own [O, B], the map M before it becomes M + [O, B] - O M."""
    first, *others = maps.unbind(2)
    composed = [first]
    for own in others:
        overlap, before = own.chunk(2, dim=-1)[0], composed[-1]
        composed.append(own + before - overlap @ before)
    return composed


def _composed_back(maps: Tensor, d_map: Tensor) -> Tensor:
    """Returns the gradient of the maps of chunks from that of a segment's map, [s, h, d, 2 d]."""
    d = maps.shape[-2]
    d_maps = torch.empty_like(maps)
    before = _composed(maps[:, :, :-1]) if maps.shape[2] > 1 else []
    for place in reversed(range(maps.shape[2])):
        own = d_maps[:, :, place]
        own.copy_(d_map)
        if place:
            own[..., :d] -= d_map @ before[place - 1].mT
            d_map = d_map - maps[:, :, place, :, :d].mT @ d_map
    return d_maps


class _Chunks:
    """The maps of a part's chunks, with segments s, heads h, chunks c and their tokens t.

    Segments are filled up to equal chunks with tokens that write nothing.
    """

    def __init__(self, part: Part, k: Tensor, v: Tensor, weight: Tensor):
        chunks = -(-k.shape[1] // CHUNK)

        def chunked(x: Tensor) -> Tensor:
            own = rows_of(x, part).float()
            missing = -own.shape[2] % chunks
            if missing:
                own = F.pad(own, (0, 0, 0, missing))
            return own.unflatten(2, (chunks, -1))  # [s, h, c, t, d or 1]

        self._k, self._weight = UnitKeys.of(chunked(k)), chunked(weight[..., None])
        keys = self._k.keys
        self._both = torch.cat((keys, chunked(v)), dim=-1)  # [K, V]
        self._products = keys @ keys.mT
        self._system = (self._weight * self._products).tril_(-1)
        self._solved = _solve(self._system, self._weight * self._both)  # T [K, V]
        self.maps = keys.mT @ self._solved
        """[O, B], [s, h, c, d, 2 d]."""

    def gradients(self, d_maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of k, v and weight, [s, h, c, t, d or 1], from that of the maps."""
        keys, d = self._k.keys, d_maps.shape[-2]
        d_weighted = _solve(self._system.mT, keys @ d_maps, upper=True)
        d_system = (d_weighted @ self._solved.mT).neg_().tril_(-1)
        d_weight = torch.linalg.vecdot(d_weighted, self._both)
        d_weight += torch.linalg.vecdot(d_system, self._products)
        d_both = d_weighted.mul_(self._weight)
        d_system.mul_(self._weight)
        d_keys = (d_system + d_system.mT) @ keys
        d_keys += self._solved @ d_maps.mT
        d_keys += d_both[..., :d]
        return self._k.gradient(d_keys), d_both[..., d:], d_weight[..., None]


def _solve(system: Tensor, x: Tensor, upper: bool = False) -> Tensor:
    """Solves (I + system) y = x, where the system is strictly triangular."""
    return torch.linalg.solve_triangular(system, x, upper=upper, unitriangular=True)
