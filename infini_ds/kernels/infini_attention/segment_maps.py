"""The gated delta rule, see `memory.gated_delta`, as one affine map per segment.

With K, V and w a segment's keys, values and write weights, each token in turn changes the memory by
M <- M - w k^T (k M - v). All tokens together change it by M <- M - O M + B, where

    [O, B] = K^T T [K, V],   T = (I + tril(diag(w) K K^T, -1))^-1 diag(w)

Triangular systems are solved for CHUNK tokens at a time, and the maps of a segment's chunks are
composed. Nothing but the inputs is kept for the backward pass.
"""

from typing import NamedTuple

import torch
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
    """[..., d]: SiLU(x) over its length."""
    scale: Tensor
    """[..., 1]: one over the length."""
    sigmoid: Tensor
    """[..., d], of x."""
    x: Tensor
    """[..., d]."""

    @classmethod
    def of(cls, x: Tensor) -> "UnitKeys":
        """Computes the features of queries or keys [..., d]."""
        x = x.float()
        sigmoid = x.sigmoid()
        keys = x * sigmoid
        scale = torch.linalg.vecdot(keys, keys)[..., None].add_(KEY_EPSILON).rsqrt_()
        return cls(keys.mul_(scale), scale, sigmoid, x)

    def gradient(self, d_keys: Tensor) -> Tensor:
        """Returns the gradient of x from that of the features."""
        along = torch.linalg.vecdot(self.keys, d_keys)[..., None]
        d_silu = torch.addcmul(d_keys, self.keys, along, value=-1).mul_(self.scale)
        return d_silu.mul_(self.sigmoid * (1 + self.x * (1 - self.sigmoid)))


class _SegmentMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, v, weight):
        ctx.save_for_backward(k, v, weight)
        segments, n, kv_heads, d = k.shape
        maps = torch.empty(segments, kv_heads, d, 2 * d, device=k.device)
        for part in parts(segments, n, kv_heads, d, k.device):
            maps[part] = _composed(_chunks(part, k, v, weight))[-1]
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx, d_maps):
        k, v, weight = ctx.saved_tensors
        segments, n, kv_heads, d = k.shape
        dk, dv, d_weight = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v, weight)
        )
        for part in parts(segments, n, kv_heads, d, k.device):
            chunks = _chunks(part, k, v, weight)
            composed = _composed(chunks)
            d_map = d_maps[part]
            for number in reversed(range(len(chunks))):
                chunk, d_own = chunks[number], d_map
                if number:
                    before = composed[number - 1]
                    d_own = d_map.clone()
                    d_own[..., :d] -= d_map @ before.mT
                    d_map = d_map - chunk.map[..., :d].mT @ d_map
                own_dk, own_dv, own_d_weight = chunk.gradients(d_own)
                rows_of(dk, part)[..., chunk.rows, :] = own_dk.to(dk.dtype)
                rows_of(dv, part)[..., chunk.rows, :] = own_dv.to(dv.dtype)
                rows_of(d_weight[..., None], part)[..., chunk.rows, :] = own_d_weight
        return dk, dv, d_weight if ctx.needs_input_grad[2] else None


def _chunks(part: Part, k: Tensor, v: Tensor, weight: Tensor) -> list["_Chunk"]:
    own = [rows_of(x, part) for x in (k, v, weight[..., None])]
    return [
        _Chunk(slice(begin, begin + CHUNK), *(x[..., begin : begin + CHUNK, :] for x in own))
        for begin in range(0, k.shape[1], CHUNK)
    ]


def _composed(chunks: list["_Chunk"]) -> list[Tensor]:
    """Maps of the tokens up to the end of each chunk, [s, h, d, 2 d]."""
    maps = [chunks[0].map]
    for chunk in chunks[1:]:
        d = chunk.map.shape[-2]
        maps.append(maps[-1] + chunk.map - chunk.map[..., :d] @ maps[-1])
    return maps


class _Chunk:
    """The map of a few tokens, with segments s, heads h and tokens c.

    Args:
        rows: places of the tokens in their segments.
        k, v: [s, h, c, d].
        weight: [s, h, c, 1].
    """

    def __init__(self, rows: slice, k: Tensor, v: Tensor, weight: Tensor):
        self.rows = rows
        self._k, self._weight = UnitKeys.of(k), weight
        keys = self._k.keys
        self._both = torch.cat((keys, v.float()), dim=-1)  # [K, V]
        self._products = keys @ keys.mT
        self._system = (weight * self._products).tril(-1)
        self._solved = _solve(self._system, weight * self._both)  # T [K, V]
        self.map = keys.mT @ self._solved
        """[O, B], [s, h, d, 2 d]."""

    def gradients(self, d_map: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of k, v and weight, in their shapes, from that of the map."""
        keys, weight = self._k.keys, self._weight
        d = keys.shape[-1]
        d_weighted = _solve(self._system.mT, keys @ d_map, upper=True)
        d_system = (d_weighted @ self._solved.mT).neg_().tril(-1)
        d_weight = torch.linalg.vecdot(d_weighted, self._both)
        d_weight += torch.linalg.vecdot(d_system, self._products)
        d_both = d_weighted.mul_(weight)
        d_system.mul_(weight)
        d_keys = self._solved @ d_map.mT + d_both[..., :d] + (d_system + d_system.mT) @ keys
        return self._k.gradient(d_keys), d_both[..., d:], d_weight[..., None]


def _solve(system: Tensor, x: Tensor, upper: bool = False) -> Tensor:
    """Solves (I + system) y = x, where the system is strictly triangular."""
    return torch.linalg.solve_triangular(system, x, upper=upper, unitriangular=True)
