"""Reads the memory by eq. (3) and mixes the result with local attention, eq. (6)."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infini_ds.kernels.infini_attention.mixed_rows import MixedRows, Readers, joined, mixed_rows
from infini_ds.kernels.infini_attention.segment_sums import sigma
from infini_ds.memory.state import EPSILON


class DividedReadAndMix(torch.autograd.Function):
    """The arguments are a_dot and q [segments, n, heads, d], kv [segments, kv_heads, d, d] and norm
    [segments, kv_heads, d], the gate [segments, heads] fp32, and which tokens read."""

    @staticmethod
    def forward(ctx, a_dot, q, kv, norm, gate, readers: Readers | None):
        ctx.save_for_backward(a_dot, q, kv, norm, gate)
        ctx.readers = readers
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if readers is not None:
            out.copy_(a_dot)
        for rows in mixed_rows(q, kv, gate, readers):
            read = _Read(rows, q, kv, norm)
            numerator = read.sigma_q.to(rows.dtype) @ read.kv
            mixed = torch.addcmul(
                numerator.mul_((rows.gate / read.denominator).to(rows.dtype)),
                rows.of(a_dot).to(rows.dtype),
                (1 - rows.gate).to(rows.dtype),
            )
            rows.of(out).copy_(mixed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        a_dot, q, kv, norm, gate = ctx.saved_tensors
        d_dot, dq, d_kv, d_norm, d_gate = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (a_dot, q, kv, norm, gate)
        )
        if ctx.readers is not None:
            d_dot.copy_(gradient)
            for x in (dq, d_kv, d_norm, d_gate):
                x.zero_()
        for rows in mixed_rows(q, kv, gate, ctx.readers):
            part, read = rows.part, _Read(rows, q, kv, norm)
            d_out = rows.of(gradient).to(rows.dtype)  # [s, h, g, n, d]
            share = rows.gate / read.denominator  # [s, h, g, n, 1]
            d_sigma = (d_out @ read.kv.mT).float()  # of the numerator alone; share is applied below
            along_read = (d_sigma * read.sigma_q).sum(dim=-1, keepdim=True) / read.denominator
            along_local = d_out * rows.of(a_dot)
            rows.per_head(d_gate).copy_(rows.gate_gradient(along_read, along_local))
            rows.of(d_dot).copy_(d_out * (1 - rows.gate).to(rows.dtype))
            # [s, h, d, g n] @ [s, h, g n, d] -> [s, h, d, d]
            d_kv[part] = joined((read.sigma_q * share).to(rows.dtype)).mT @ joined(d_out)
            d_denominator = along_read.mul_(share).neg_()
            d_norm[part] = (joined(read.sigma_q).mT @ joined(d_denominator))[..., 0]
            d_sigma.mul_(share).addcmul_(d_denominator, norm[part][:, :, None, None])
            rows.of(dq).copy_(d_sigma.mul_(read.sigma_q.clamp_(max=1)))
        return d_dot, dq, d_kv, d_norm, d_gate, None


class _Read:
    """Operands of eq. (3) for some rows."""

    def __init__(self, rows: MixedRows, q: Tensor, kv: Tensor, norm: Tensor):
        self.kv = kv[rows.part][:, :, None].to(rows.dtype)
        self.sigma_q = sigma(rows.of(q))  # [s, h, g, n, d]
        self.denominator = self.sigma_q @ norm[rows.part][:, :, None, :, None]
        self.denominator.clamp_(min=EPSILON)
