"""The gated delta rule, see `memory.gated_delta`, walked over the chunks of all segments.

With K, V and w a chunk's keys, values and write weights, its tokens in turn change the memory by
M <- M - w k^T (k M - v). All of them together change it by

    M <- M + K^T T (V - K M),   T = (I + tril(diag(w) K K^T, -1))^-1 diag(w)

Nothing but the inputs and the memory before each segment is kept for the backward pass.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from infini_ds.kernels.infini_attention.unit_features import unit_features
from infini_ds.memory.gated_delta import GatedDelta

WALKED = 2**19
"""How many numbers of a segment's keys to process at a time on a CPU, at least one head's."""


def chunk_walk(
    k: Tensor, v: Tensor, weight: Tensor, incoming: Tensor, starts: Tensor, rule: GatedDelta
) -> tuple[Tensor, Tensor]:
    """Computes the state that each segment finds and the state after the last one, in fp32.

    Args:
        k, v: [batch, segments, n, kv_heads, d].
        weight: [batch, segments, n, kv_heads] fp32, 0 on padding.
        incoming: the state before the window, [batch, kv_heads, f, e] for keys of f features, with
            e of at least d. Values are written to its first d columns; from the others tokens only
            remove.
        starts: [batch, segments], where a document begins, and the state is 0.
        rule: gives the features and the chunks.

    Returns:
        [batch, segments, kv_heads, f, e] and [batch, kv_heads, f, e].
    """
    return _ChunkWalk.apply(k, v, weight, incoming, starts, rule)  # type: ignore[return-value]


class _ChunkWalk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, v, weight, incoming, starts, rule):
        states = incoming.new_empty(k.shape[0], k.shape[1], *incoming.shape[1:])
        final = torch.empty_like(incoming)
        for heads in _head_groups(k, incoming):
            state = incoming[:, heads]
            for s, begin in enumerate(starts.unbind(1)):
                state = state.masked_fill(begin[:, None, None, None], 0)
                states[:, s, heads] = state
                own = (x[:, s, :, heads] for x in (k, v, weight))
                state = _Chunks(*own, width=state.shape[-1], rule=rule).walk(state)
            final[:, heads] = state
        ctx.save_for_backward(k, v, weight, states, starts)
        ctx.rule = rule
        return states, final

    @staticmethod
    @once_differentiable
    def backward(ctx, d_states, d_final):
        k, v, weight, states, starts = ctx.saved_tensors
        dk, dv, d_weight, d_incoming = map(torch.empty_like, (k, v, weight, d_final))
        for heads in _head_groups(k, d_final):
            d_state = d_final[:, heads]
            for s, begin in reversed([*enumerate(starts.unbind(1))]):
                own = (x[:, s, :, heads] for x in (k, v, weight))
                chunks = _Chunks(*own, width=d_state.shape[-1], rule=ctx.rule)
                d_state, *found = chunks.walk_back(states[:, s, heads], d_state)
                for x, gradient in zip((dk, dv, d_weight), found, strict=True):
                    x[:, s, :, heads] = gradient
                d_state += d_states[:, s, heads]
                d_state = d_state.masked_fill(begin[:, None, None, None], 0)
            d_incoming[:, heads] = d_state
        return dk, dv, d_weight, d_incoming, None, None


def _head_groups(k: Tensor, state: Tensor) -> Iterator[slice]:
    """Splits the key-value heads: on a CPU into groups of which few segments fit its cache."""
    batch, _, n, kv_heads, _ = k.shape
    features = state.shape[-2]
    step = kv_heads if k.device.type != "cpu" else max(1, WALKED // (batch * n * features))
    return (slice(start, start + step) for start in range(0, kv_heads, step))


class _Chunks:
    """The chunks c of a segment, with their tokens t and rows r, which are batch and heads.

    The segment is filled up to equal chunks with tokens that write nothing.

    Args:
        k, v: [batch, n, heads, d].
        weight: [batch, n, heads].
        width: e, the columns of states.
        rule: gives the features and the chunks.
    """

    def __init__(self, k: Tensor, v: Tensor, weight: Tensor, width: int, rule: GatedDelta):
        self._shape, self._chunk = k.shape, rule.chunk
        self._k, self._weight = unit_features(self._chunked(k), rule.shifts), self._chunked(weight)
        self._values = self._chunked(v)  # [c, r, t, e]
        if width > v.shape[-1]:
            self._values = F.pad(self._values, (0, width - v.shape[-1]))
        self._keys = self._k.features  # [c, r, t, f]
        self._products = self._keys @ self._keys.mT
        system = (self._weight[..., None] * self._products).tril_(-1)
        unit = torch.eye(system.shape[-1], device=k.device).expand_as(system)
        self._inverse = torch.linalg.solve_triangular(
            system, unit, upper=False, unitriangular=True
        )  # of I + system
        self._t = self._inverse * self._weight[..., None, :]

    def walk(self, state: Tensor) -> Tensor:
        """Returns the state after the segment from the one before it, [batch, heads, f, e]."""
        rows = state.flatten(0, 1)
        for k, v, t in zip(self._keys, self._values, self._t, strict=True):
            rows = torch.baddbmm(rows, k.mT, t @ torch.baddbmm(v, k, rows, alpha=-1))
        return rows.view_as(state)

    def walk_back(self, state: Tensor, d_after: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the gradients of the state before the segment, and of k, v and weight, from that
        of the state after it."""
        missing, new, d_new, d_missing = (torch.empty_like(self._values) for _ in range(4))
        rows, before = state.flatten(0, 1), []
        for c, (k, v, t) in enumerate(zip(self._keys, self._values, self._t, strict=True)):
            before.append(rows)
            torch.baddbmm(v, k, rows, alpha=-1, out=missing[c])
            torch.bmm(t, missing[c], out=new[c])
            rows = torch.baddbmm(rows, k.mT, new[c])
        d_keys, d_rows = torch.empty_like(self._keys), d_after.flatten(0, 1)
        for c in reversed(range(len(before))):
            k, t = self._keys[c], self._t[c]
            torch.bmm(k, d_rows, out=d_new[c])
            torch.bmm(t.mT, d_new[c], out=d_missing[c])
            torch.bmm(new[c], d_rows.mT, out=d_keys[c])
            d_keys[c].baddbmm_(d_missing[c], before[c].mT, alpha=-1)
            d_rows = torch.baddbmm(d_rows, k.mT, d_missing[c], alpha=-1)
        d_t = d_new @ missing.mT
        d_weight = torch.linalg.vecdot(d_t, self._inverse, dim=-2)
        # The inverse's gradient, d_t with its columns weighted, becomes that of the system.
        d_inverse = d_t.mul_(self._weight[..., None, :])
        d_system = (self._inverse.mT @ d_inverse @ self._inverse.mT).neg_().tril_(-1)
        d_weight += torch.linalg.vecdot(d_system, self._products)
        d_system.mul_(self._weight[..., None])
        d_keys += (d_system + d_system.mT) @ self._keys
        d = self._shape[-1]
        dk, dv, d_weight = map(
            self._joined, (self._k.gradient(d_keys), d_missing[..., :d], d_weight)
        )
        return d_rows.view_as(d_after), dk, dv, d_weight

    def _chunked(self, x: Tensor) -> Tensor:
        """[batch, n, heads, ...] as [c, r, t, ...] in fp32."""
        n = x.shape[1]
        chunks = -(-n // self._chunk)
        x = x.float()
        if missing := -n % chunks:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
        x = x.unflatten(1, (chunks, -1))  # [batch, c, t, heads, ...]
        return x.transpose(0, 1).transpose(2, 3).flatten(1, 2)

    def _joined(self, x: Tensor) -> Tensor:
        """[c, r, t, ...] as [batch, n, heads, ...]."""
        batch, n, heads = self._shape[:3]
        x = x.unflatten(1, (batch, heads)).transpose(0, 1).transpose(2, 3)
        return x.flatten(1, 2)[:, :n]
