"""Chooses the implementation of local attention."""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from infini_ds.kernels.local_attention.cpu import local_attention_cpu
from infini_ds.kernels.local_attention.rotary import rotate
from infini_ds.kernels.local_attention.runs import Run, positions_of, runs_of, unseen
from infini_ds.kernels.local_attention.sliding import sliding_attention
from infini_ds.layout import begins_with_padding, made_once

LONG = 512
"""Segment length from which the tiled CPU path is faster; shorter segments are too many pieces."""


MASKED = 256
"""Segment length up to which packed segments are one call with a mask. Calls by documents take half
as long again at 128 tokens, as long at 256, and two thirds of the time at 512."""


class Call(NamedTuple):
    """Consecutive rows of packed segments that are computed together, in equal pieces."""

    count: int
    """Number of pieces."""
    rows: int
    """Rows of each piece."""
    begins: Tensor | None
    """As in Run."""


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor],
    begins: Tensor | None = None,
    previous: Tensor | None = None,
) -> Tensor:
    """Computes causal softmax attention inside each document of a segment.

    Args:
        q: [batch, segments, n, heads, d], before rotary.
        k, v: [batch, segments, n, kv_heads, d], before rotary.
        rotary: cos and sin, each [n, d / 2].
        begins: as in Layout, [batch, segments, n]; None: each segment is of one document. Padding
            counts as documents of one token.
        previous: if given, the window slides, see `sliding_attention`.

    Returns:
        [batch, segments, n, heads, d].
    """
    if previous is not None:
        return sliding_attention(q, k, v, rotary, previous, begins)
    n = q.shape[2]
    if begins is None or all(own[0].is_whole(n) for own in runs_of(begins)):
        if q.is_cpu and torch.get_num_threads() == 1 and n >= LONG:
            return local_attention_cpu(q, k, v, *rotary)
        return _attend(q, k, v, rotary)
    if n > MASKED:
        return _by_runs(q, k, v, rotary, runs_of(begins))
    return _attend(q, k, v, rotary, positions_of(begins), _mask(begins, q.dtype))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor],
    positions: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attends by PyTorch's own operator, with what a mask adds to scores.

    Args:
        positions: rotary positions, [batch, segments, n]; None: those in the segment.
        mask: [batch x segments, 1, n, n]; None: a row sees itself and those before it.
    """
    group = q.shape[3] // k.shape[3]
    q, k = rotate(q, *rotary, positions), rotate(k, *rotary, positions)
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=3) for x in (k, v))
    batch = q.shape[0]
    q, k, v = (rearrange(x, "b s n h d -> (b s) h n d") for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
    return rearrange(out, "(b s) h n d -> b s n h d", b=batch)


def _mask(begins: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what is added to scores, [batch x segments, 1, n, n]."""

    def make() -> Tensor:
        return unseen(begins_with_padding(begins).flatten(0, 1)).to(dtype)[:, None]

    return made_once(begins, ("mask", dtype), make)


def _by_runs(
    q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor], runs: list[list[Run]]
) -> Tensor:
    """Attends inside each run as inside a segment of its own."""
    calls = _calls(runs, q.shape[2])
    sizes = [call.count * call.rows for call in calls]
    split_q, split_k, split_v = (x.flatten(0, 2).split(sizes) for x in (q, k, v))
    outputs = [
        _attend_apart(call, own_q, own_k, own_v, rotary)
        for call, own_q, own_k, own_v in zip(calls, split_q, split_k, split_v, strict=True)
    ]
    return torch.cat(outputs).view(q.shape)


def _attend_apart(
    call: Call, q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor]
) -> Tensor:
    """Attends inside each piece of a call, [count x rows, heads, d]."""
    q, k, v = (x.unflatten(0, (1, call.count, call.rows)) for x in (q, k, v))
    rotary = rotary[0][: call.rows], rotary[1][: call.rows]
    if call.begins is None:
        return local_attention(q, k, v, rotary).flatten(0, 2)
    begins = call.begins.to(q.device)
    positions = torch.arange(call.rows, device=q.device) - begins
    mask = unseen(begins).to(q.dtype)
    return _attend(q, k, v, rotary, positions[None, None], mask[None, None]).flatten(0, 2)


def _calls(runs: list[list[Run]], n: int) -> list[Call]:
    """Splits the work; segments of one document that follow each other are one call."""
    calls: list[Call] = []
    for whole, segments in itertools.groupby(runs, lambda own: own[0].is_whole(n)):
        if whole:
            calls.append(Call(len(list(segments)), n, None))
        else:
            calls += [Call(1, run.end - run.start, run.begins) for own in segments for run in own]
    return calls
