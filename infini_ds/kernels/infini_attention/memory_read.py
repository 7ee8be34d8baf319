"""Reads the memory and mixes the result with local attention, as one operation.

For the backward pass only queries, local output and memories are kept, which exist anyway. Feature
maps and reads are recomputed.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from infini_ds.kernels.infini_attention.segment_sums import Part, parts, sigma
from infini_ds.layout import Layout, memory_tokens
from infini_ds.memory.state import EPSILON, MemoryState
from infini_ds.system.ranges import compute_dtype


def read_and_mix(
    a_dot: Tensor, q: Tensor, states: MemoryState, beta: Tensor, layout: Layout | None = None
) -> Tensor:
    """Computes eq. (3) and (6), and returns A_dot alone where the memory is empty.

    Args:
        a_dot, q: [batch, segments, n, heads, d]; the queries of a group read one memory.
        states: the memory before each segment, kv [batch, segments, kv_heads, d, d] and norm
            [batch, segments, kv_heads, d].
        beta: [heads].
        layout: if segments are packed, only the tokens of their first documents read; None: all.

    Returns:
        [batch, segments, n, heads, d].
    """
    group = q.shape[3] // states.norm.shape[2]
    written = (states.norm.sum(-1) > 0).repeat_interleave(group, dim=2)  # [batch, segments, heads]
    gate = beta.float().sigmoid() * written
    readers = None
    if layout is not None and layout.begins is not None:
        readers = _readers(layout, q.shape[2])
    flat = (x.flatten(0, 1) for x in (a_dot, q, *states, gate))
    return _ReadAndMix.apply(*flat, readers).view(q.shape)  # type: ignore[union-attr]


class _Readers(NamedTuple):
    """Which tokens of packed segments read the memory, segments flattened."""

    tokens: Tensor
    """[segments, n] bool."""
    rows: list[int]
    """Of each segment, how many rows from the first on to work on."""


def _readers(layout: Layout, n: int) -> _Readers:
    tokens = memory_tokens(layout, n).flatten(0, 1)
    if tokens.device.type != "cpu":  # nothing waits for a device
        return _Readers(tokens, [n] * len(tokens))
    # The memory is empty where a document starts.
    return _Readers(tokens, layout.lengths.masked_fill(layout.starts, 0).flatten().tolist())


class _ReadAndMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a_dot, q, kv, norm, gate, readers):
        ctx.save_for_backward(a_dot, q, kv, norm, gate)
        ctx.readers = readers
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if readers is not None:
            out.copy_(a_dot)
        for read in _reads(q, kv, norm, gate, readers):
            numerator = read.sigma_q.to(read.dtype) @ read.kv
            mixed = torch.addcmul(
                numerator.mul_((read.gate / read.denominator).to(read.dtype)),
                read.rows(a_dot).to(read.dtype),
                (1 - read.gate).to(read.dtype),
            )
            read.rows(out).copy_(mixed)
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
        for read in _reads(q, kv, norm, gate, ctx.readers):
            part = read.part
            d_out = read.rows(gradient).to(read.dtype)  # [s, h, g, n, d]
            share = read.gate / read.denominator  # [s, h, g, n, 1]
            d_sigma = (d_out @ read.kv.mT).float()  # of the numerator alone; share is applied below
            along_read = (d_sigma * read.sigma_q).sum(dim=-1, keepdim=True) / read.denominator
            along_local = d_out * read.rows(a_dot)
            read.per_head(d_gate).copy_(read.gate_gradient(along_read, along_local))
            read.rows(d_dot).copy_(d_out * (1 - read.gate).to(read.dtype))
            # [s, h, d, g n] @ [s, h, g n, d] -> [s, h, d, d]
            d_kv[part] = _joined((read.sigma_q * share).to(read.dtype)).mT @ _joined(d_out)
            d_denominator = along_read.mul_(share).neg_()
            d_norm[part] = (_joined(read.sigma_q).mT @ _joined(d_denominator))[..., 0]
            d_sigma.mul_(share).addcmul_(d_denominator, norm[part][:, :, None, None])
            read.rows(dq).copy_(d_sigma.mul_(read.sigma_q.clamp_(max=1)))
        return d_dot, dq, d_kv, d_norm, d_gate, None


def _reads(
    q: Tensor, kv: Tensor, norm: Tensor, gate: Tensor, readers: _Readers | None
) -> Iterator["_Read"]:
    """All parts in which a token reads."""
    for part in parts(q.shape[0], q.shape[1], kv.shape[1], kv.shape[2], q.device):
        if readers is None:
            yield _Read(part, q, kv, norm, gate, None)
        elif rows := max(readers.rows[part.segments]):
            yield _Read(part, q, kv, norm, gate, readers.tokens[part.segments, :rows])


class _Read:
    """Operands of eq. (3) for one part, with key-value heads h and g query heads for each.

    With `readers` [segments, rows] bool, only the first rows of segments, and the gate of those
    that do not read is 0.
    """

    def __init__(
        self, part: Part, q: Tensor, kv: Tensor, norm: Tensor, gate: Tensor, readers: Tensor | None
    ):
        self.part = part
        self.group = q.shape[2] // kv.shape[1]
        self.dtype = compute_dtype(q.dtype)
        self.kv = kv[part][:, :, None].to(self.dtype)
        self.gate = self.per_head(gate)[..., None, None]
        self.readers = None
        self.end = None
        if readers is not None:
            self.end = readers.shape[1]
            self.readers = readers[:, None, None, :, None].float()  # [s, 1, 1, n, 1]
            self.gate = self.gate * self.readers
        self.sigma_q = sigma(self.rows(q))
        self.denominator = self.sigma_q @ norm[part][:, :, None, :, None]
        self.denominator.clamp_(min=EPSILON)

    def rows(self, x: Tensor) -> Tensor:
        """Views this part of x [segments, n, heads, d] as [s, h, g, n, d]."""
        own = x.unflatten(2, (-1, self.group))[self.part.segments, : self.end, self.part.heads]
        return rearrange(own, "s n h g d -> s h g n d")

    def per_head(self, x: Tensor) -> Tensor:
        """Views this part of x [segments, heads] as [s, h, g]."""
        return x.unflatten(1, (-1, self.group))[self.part]

    def gate_gradient(self, along_read: Tensor, along_local: Tensor) -> Tensor:
        """What the gate's change does, along the read [s, h, g, n, 1] and a_dot [s, h, g, n, d]."""
        if self.readers is None:
            local = along_local.sum(dim=(-2, -1), dtype=torch.float32)
            return along_read.sum(dim=(-2, -1)) - local
        local = along_local.sum(dim=-1, keepdim=True, dtype=torch.float32)
        return ((along_read - local) * self.readers).sum(dim=(-2, -1))


def _joined(x: Tensor) -> Tensor:
    return x.flatten(2, 3)  # [s, h, g n, d]
