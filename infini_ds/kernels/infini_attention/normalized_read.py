"""Reads the memory by the gated delta rule and mixes the result with local attention.

As in `memory_read`, only queries, local output and memories are kept for the backward pass.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infini_ds.kernels.infini_attention.mixed_rows import MixedRows, Readers, joined, mixed_rows
from infini_ds.kernels.infini_attention.unit_features import unit_features
from infini_ds.memory.gated_delta import READ_EPSILON


class NormalizedReadAndMix(torch.autograd.Function):
    """The arguments are a_dot and q [segments, n, heads, d], kv [segments, kv_heads, f, d], the
    gate [segments, heads] fp32, which tokens read, and the shifts of `unit_features`."""

    @staticmethod
    def forward(ctx, a_dot, q, kv, gate, readers: Readers | None, shifts: int):
        ctx.save_for_backward(a_dot, q, kv, gate)
        ctx.readers, ctx.shifts = readers, shifts
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if readers is not None:
            out.copy_(a_dot)
        for rows in mixed_rows(q, kv, gate, readers):
            read = _Read(rows, q, kv, shifts)
            mixed = torch.addcmul(
                read.found.mul_((rows.gate * read.scale).to(rows.dtype)),
                rows.of(a_dot).to(rows.dtype),
                (1 - rows.gate).to(rows.dtype),
            )
            rows.of(out).copy_(mixed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        a_dot, q, kv, gate = ctx.saved_tensors
        d_dot, dq, d_kv, d_gate = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (a_dot, q, kv, gate)
        )
        if ctx.readers is not None:
            d_dot.copy_(gradient)
            for x in (dq, d_kv, d_gate):
                x.zero_()
        for rows in mixed_rows(q, kv, gate, ctx.readers):
            read = _Read(rows, q, kv, ctx.shifts)
            d_out = rows.of(gradient).to(rows.dtype)  # [s, h, g, n, d]
            normed = read.found.float() * read.scale
            along_read = (normed * d_out).sum(dim=-1, keepdim=True)
            rows.per_head(d_gate).copy_(rows.gate_gradient(along_read, d_out * rows.of(a_dot)))
            rows.of(d_dot).copy_(d_out * (1 - rows.gate).to(rows.dtype))
            mean = along_read.mul_(rows.gate / q.shape[-1])
            d_found = torch.addcmul(rows.gate * d_out, normed, mean, value=-1)
            d_found = d_found.mul_(read.scale).to(rows.dtype)
            # [s, h, f, g n] @ [s, h, g n, d] -> [s, h, f, d]
            d_kv[rows.part] = joined(read.q.features.to(rows.dtype)).mT @ joined(d_found)
            d_features = (d_found @ read.kv.mT).float()
            rows.of(dq).copy_(read.q.gradient(d_features))
        return d_dot, dq, d_kv, d_gate, None, None


class _Read:
    """Operands of q M of some rows, and one over its root mean square."""

    def __init__(self, rows: MixedRows, q: Tensor, kv: Tensor, shifts: int):
        self.q = unit_features(rows.of(q), shifts)
        self.kv = kv[rows.part][:, :, None].to(rows.dtype)
        self.found = self.q.features.to(rows.dtype) @ self.kv  # [s, h, g, n, d]
        square = torch.linalg.vecdot(self.found, self.found).float()[..., None]
        self.scale = square.div_(q.shape[-1]).add_(READ_EPSILON).rsqrt_()
