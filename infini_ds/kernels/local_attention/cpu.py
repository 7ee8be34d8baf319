"""Local attention for training on a CPU: one thread, one key-value head of one segment at a time.

PyTorch's own multiplies pieces too small for the core's matrix units. Here tiles of scores are as
large as stays in the core's cache. More threads than one have too little to do in each product, so
there PyTorch's own is used.

Scores are in powers of two, which are quicker to take than powers of e: the factor
log2(e) / sqrt(d) is in the queries, which are rounded once, after it. The rows of a group's queries
are in order of position, [n x group, d], so that one product serves all heads of the group.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infini_ds.kernels.local_attention.rotary import rotated

FORWARD_TILE = 128
"""Positions whose scores, fp32, exist at one time."""
BACKWARD_TILE = 256
"""Keys whose scores, of the operands' type, exist at one time."""
TERMS = 2
"""Numbers of the operands' type whose sum stands for one fp32 number."""


def local_attention_cpu(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `local_attention`."""
    return _LocalAttention.apply(q, k, v, cos, sin)  # type: ignore[return-value]


class _LocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cos, sin):
        n, kv_heads = k.shape[2:4]
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        out = torch.empty(q.shape, dtype=q.dtype)
        log_sum = torch.empty(*k.shape[:2], kv_heads, n * (q.shape[3] // kv_heads))
        for at in _heads(k):
            own_q, own_k, own_v, own_out = (_own(x, at, kv_heads) for x in (q, k, v, out))
            log_sum[at] = _forward(own_q, own_k, own_v, own_out, cos, sin)
        ctx.save_for_backward(q, k, v, out, log_sum, cos, sin)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        q, k, v, out, log_sum, cos, sin = ctx.saved_tensors
        kv_heads = k.shape[3]
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        for at in _heads(k):
            own_q, own_k, own_v, own_out, own_gradient = (
                _own(x, at, kv_heads) for x in (q, k, v, out, gradient)
            )
            values = _backward(own_q, own_k, own_v, own_out, own_gradient, log_sum[at], cos, sin)
            for result, value in zip((dq, dk, dv), values, strict=True):
                _own(result, at, kv_heads).copy_(value)
        return dq, dk, dv, None, None


def _heads(k: Tensor):
    """Batch, segment and key-value head of each piece of work."""
    return [
        (b, s, h) for b in range(k.shape[0]) for s in range(k.shape[1]) for h in range(k.shape[3])
    ]


def _own(x: Tensor, at: tuple[int, int, int], kv_heads: int) -> Tensor:
    """A view of the heads of one piece of work, [n, group or 1, d]."""
    group = x.shape[3] // kv_heads
    return x[at[0], at[1], :, at[2] * group : (at[2] + 1) * group]


def _forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """q [n, group, d], k and v [n, 1, d]; fills out, returns log2 of the sums [n x group]."""
    n, group, d = q.shape
    scale = d**-0.5 * math.log2(math.e)
    queries = rotated(q.float(), cos * scale, sin * scale).to(q.dtype).float().flatten(0, 1)
    keys = rotated(k.float(), cos, sin).to(k.dtype).float().flatten(0, 1)
    values = v[:, 0].contiguous()
    log_sum = torch.empty(n * group)
    future = torch.full((FORWARD_TILE, FORWARD_TILE), float("-inf")).triu(1)
    future = future.repeat_interleave(group, dim=0)
    for start in range(0, n, FORWARD_TILE):
        end = min(start + FORWARD_TILE, n)
        rows = slice(start * group, end * group)
        scores = queries[rows] @ keys[:end].T
        scores[:, start:] += future[: len(scores), : end - start]
        highest = scores.amax(dim=1, keepdim=True)
        weights = scores.sub_(highest).exp2_()
        total = weights.sum(dim=1, keepdim=True)
        mixed = weights.div_(total).to(v.dtype) @ values[:end]
        out[start:end] = mixed.view(end - start, group, d)
        log_sum[rows] = total.log2_().add_(highest)[:, 0]
    return log_sum


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    gradient: Tensor,
    log_sum: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [n, group, d], k and v [n, 1, d].

    Scores are computed again by tiles of keys against the queries that see them, transposed, and
    rounded to the operands' type. What they lose by it grows with their size, so they come out of
    the product small: less the logarithm of the row's sum, as more terms of the product, and plus
    half of log2 of the keys in the row, so that an even row and a sharp one lose alike and no more
    than the rounding of the weights. The gradient's rows are divided by the same power of two.
    The mean that is subtracted from a weight's gradient is in the product too: where attention is
    sharp, what is left is a small difference of large numbers.
    """
    n, group, d = q.shape
    scale = d**-0.5 * math.log2(math.e)
    shift = (torch.arange(1, n + 1).log2() / 2).round()[:, None].expand(n, group)
    gradient = gradient.float() * torch.exp2(-shift)[..., None]
    mean = (out.float() * gradient).sum(dim=-1)
    queries = _with_terms(
        rotated(q.float(), cos * scale, sin * scale), shift.flatten() - log_sum, q.dtype
    )
    gradients = _with_terms(gradient, -mean.flatten(), q.dtype)
    keys = _with_ones(rotated(k.float(), cos, sin), k.dtype)
    values = _with_ones(v, v.dtype)
    future = torch.full((BACKWARD_TILE, BACKWARD_TILE), float("-inf"), dtype=q.dtype).tril(-1)
    future = future.repeat_interleave(group, dim=1)  # [keys, queries]
    dq = torch.zeros(n * group, d)
    dk, dv = torch.empty(n, d, dtype=k.dtype), torch.empty(n, d, dtype=v.dtype)
    for start in range(0, n, BACKWARD_TILE):
        end = min(start + BACKWARD_TILE, n)
        tile, rows = slice(start, end), slice(start * group, None)
        diagonal = slice(0, (end - start) * group)
        weights = keys[tile] @ queries[rows].T  # [keys, queries]
        weights[:, diagonal] += future[: end - start, diagonal]
        weights.exp2_()
        torch.mm(weights, gradients[rows, :d], out=dv[tile])
        d_scores = (values[tile] @ gradients[rows].T).mul_(weights)
        torch.mm(d_scores, queries[rows, :d], out=dk[tile])
        dq[rows] += d_scores.T @ keys[tile, :d]
    dq = rotated(dq.view(n, group, d), cos * d**-0.5, sin * -(d**-0.5))
    dk = rotated(dk.float().unsqueeze(1), cos * math.log(2), sin * -math.log(2))
    return dq, dk, dv.unsqueeze(1)


def _with_terms(x: Tensor, extra: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of x [n, group, d] and the terms of extra [n x group], for a product `_with_ones`."""
    rows, d = len(extra), x.shape[-1]
    out = torch.empty(rows, d + TERMS, dtype=dtype)
    out[:, :d] = x.flatten(0, 1)
    for term in range(d, d + TERMS):
        out[:, term] = extra
        extra = extra - out[:, term]
    return out


def _with_ones(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of x [n, 1, d] with ones where the other factor has its terms."""
    n, _, d = x.shape
    out = torch.ones(n, d + TERMS, dtype=dtype)
    out[:, :d] = x[:, 0]
    return out
