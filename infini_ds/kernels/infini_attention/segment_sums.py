"""Computes what each segment adds to the memory, keeping only keys, values and write weights."""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from infini_ds.memory.state import MemoryState
from infini_ds.system.ranges import compute_dtype

CACHED = 2**16
"""How many numbers to process at a time; a few fp32 copies fit into a core's own cache (1 MiB)."""


def segment_sums(k: Tensor, v: Tensor, weight: Tensor) -> MemoryState:
    """Sums eq. (4) over the tokens of each segment, in fp32.

    Args:
        k, v: [batch, segments, n, kv_heads, d].
        weight: [batch, segments, n, kv_heads] fp32, 0 on padding.

    Returns:
        kv [batch, segments, kv_heads, d, d], norm [batch, segments, kv_heads, d].
    """
    flat = (x.flatten(0, 1) for x in (k, v, weight))
    kv, norm = _SegmentSums.apply(*flat)  # type: ignore[misc]
    batch, segments = k.shape[:2]
    return MemoryState(kv.unflatten(0, (batch, segments)), norm.unflatten(0, (batch, segments)))


class Part(NamedTuple):
    """The segments (flattened with the batch) and key-value heads that are processed together."""

    segments: slice
    heads: slice


def parts(segments: int, n: int, kv_heads: int, d: int, device: torch.device) -> list[Part]:
    """Splits the work: on a CPU into parts of one head that fit its cache, elsewhere not at all."""
    if device.type != "cpu":
        return [Part(slice(0, segments), slice(0, kv_heads))]
    step = max(1, CACHED // (n * d))
    return [
        Part(slice(start, start + step), slice(head, head + 1))
        for start in range(0, segments, step)
        for head in range(kv_heads)
    ]


def rows_of(x: Tensor, part: Part) -> Tensor:
    """Views one part of x [segments, n, heads, d] as [s, h, n, d]."""
    return rearrange(x[part.segments, :, part.heads], "s n h d -> s h n d")


def sigma(x: Tensor) -> Tensor:
    """Computes the memory's feature map, elu + 1, in fp32. Its derivative is min(sigma(x), 1).

    Powers of two take half the time of PyTorch's elu on a CPU. Do not use this under autograd.
    """
    x = x.float()
    return (x * math.log2(math.e)).clamp_(max=0).exp2_().add_(x.clamp(min=0))


class _SegmentSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, v, weight):
        ctx.save_for_backward(k, v, weight)
        segments, n, kv_heads, d = k.shape
        kv = torch.empty(segments, kv_heads, d, d, device=k.device)
        norm = torch.empty(segments, kv_heads, d, device=k.device)
        for part in parts(segments, n, kv_heads, d, k.device):
            own_k, own_v, own_weight = (rows_of(x, part) for x in (k, v, weight[..., None]))
            weighted_k = sigma(own_k).mul_(own_weight)
            # [s, h, d, n] @ [s, h, n, d] -> [s, h, d, d]
            kv[part] = weighted_k.mT @ own_v.float()
            norm[part] = weighted_k.sum(dim=-2)
        return kv, norm

    @staticmethod
    @once_differentiable
    def backward(ctx, d_kv, d_norm):
        k, v, weight = ctx.saved_tensors
        segments, n, kv_heads, d = k.shape
        dtype = compute_dtype(k.dtype)
        dk, dv, d_weight = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v, weight)
        )
        for part in parts(segments, n, kv_heads, d, k.device):
            own_k, own_v, own_weight = (rows_of(x, part) for x in (k, v, weight[..., None]))
            sigma_k = sigma(own_k)  # [s, h, n, d]
            own_d_kv = d_kv[part].to(dtype)
            rows_of(dv, part).copy_((sigma_k * own_weight).to(dtype) @ own_d_kv)
            d_weighted = (own_v.to(dtype) @ own_d_kv.mT).float()
            d_weighted += d_norm[part].unsqueeze(-2)
            if ctx.needs_input_grad[2]:
                rows_of(d_weight[..., None], part).copy_(
                    (d_weighted * sigma_k).sum(dim=-1, keepdim=True)
                )
            d_weighted *= own_weight
            rows_of(dk, part).copy_(d_weighted.mul_(sigma_k.clamp_(max=1)))
        return dk, dv, d_weight if ctx.needs_input_grad[2] else None
