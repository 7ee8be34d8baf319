"""The delta rule, eq. (5), as one matrix per segment, so that no scan goes through tokens.

With z the norm before the segment and damping as in `delta_damping`, eq. (5) is

    M' = M + (w sigma(k))^T v - O M,   O = damping x sum of w sigma(k)^T sigma(k) / (sigma(k) z)

O, the overlap of a segment's writes with its own reads, is symmetric and does not depend on M. The
overlaps of all segments are therefore one batched product, and only matrices [d, d] are left for
the walk from segment to segment.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infini_ds.kernels.infini_attention.segment_sums import Part, parts, rows_of, sigma
from infini_ds.memory.delta import delta_damping
from infini_ds.memory.state import EPSILON
from infini_ds.system.ranges import compute_dtype


def segment_overlaps(k: Tensor, weight: Tensor, norm: Tensor, added_norm: Tensor) -> Tensor:
    """Computes O of each segment in fp32, keeping no more than its inputs for the backward pass.

    Args:
        k: [batch, segments, n, kv_heads, d].
        weight: [batch, segments, n, kv_heads] fp32, 0 on padding.
        norm: [batch, segments, kv_heads, d], the norm before each segment.
        added_norm: [batch, segments, kv_heads, d], what each segment adds to the norm; it gets no
            gradient.

    Returns:
        [batch, segments, kv_heads, d, d].
    """
    flat = (x.flatten(0, 1) for x in (k, weight, norm, added_norm))
    overlaps = _SegmentOverlaps.apply(*flat)
    return overlaps.unflatten(0, k.shape[:2])  # type: ignore[union-attr]


class _SegmentOverlaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, weight, norm, added_norm):
        segments, n, kv_heads, d = k.shape
        overlaps = torch.empty(segments, kv_heads, d, d, device=k.device)
        for part in parts(segments, n, kv_heads, d, k.device):
            keys = _Keys(part, k, weight, norm)
            root = keys.sigma_k * keys.share.sqrt()
            overlaps[part] = root.mT @ root
        damping = delta_damping(overlaps, norm, added_norm)[..., None, None]
        ctx.save_for_backward(k, weight, norm, damping)
        return overlaps.mul_(damping)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_overlaps):
        k, weight, norm, damping = ctx.saved_tensors
        segments, n, kv_heads, d = k.shape
        dk, d_weight, d_norm = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, weight, norm)
        )
        both = (d_overlaps + d_overlaps.mT).mul_(damping)
        dtype = compute_dtype(k.dtype)
        for part in parts(segments, n, kv_heads, d, k.device):
            keys = _Keys(part, k, weight, norm)
            d_sigma = (keys.sigma_k.to(dtype) @ both[part].to(dtype)).float()
            d_share = (d_sigma * keys.sigma_k).sum(dim=-1, keepdim=True).mul_(0.5)
            d_share /= keys.denominator
            if ctx.needs_input_grad[1]:
                rows_of(d_weight[..., None], part).copy_(d_share)
            d_denominator = d_share.mul_(keys.share).neg_()
            d_norm[part] = (keys.sigma_k.mT @ d_denominator)[..., 0]
            d_sigma.mul_(keys.share).addcmul_(d_denominator, norm[part][:, :, None])
            rows_of(dk, part).copy_(d_sigma.mul_(keys.sigma_k.clamp_(max=1)))
        return dk, d_weight if ctx.needs_input_grad[1] else None, d_norm, None


class _Keys:
    """Operands of the overlaps for one part, with segments s, heads h and tokens n."""

    def __init__(self, part: Part, k: Tensor, weight: Tensor, norm: Tensor):
        self.sigma_k = sigma(rows_of(k, part))  # [s, h, n, d]
        self.denominator = (self.sigma_k @ norm[part][..., None]).clamp_(min=EPSILON)
        self.share = rows_of(weight[..., None], part) / self.denominator  # [s, h, n, 1]
