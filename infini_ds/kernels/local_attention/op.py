"""Chooses how local attention is computed."""

import itertools

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from infini_ds.kernels.local_attention.cpu import local_attention_cpu
from infini_ds.kernels.local_attention.rotary import rotate
from infini_ds.kernels.local_attention.runs import Run, positions_of, runs_of, unseen
from infini_ds.layout import made_once

LONG = 512
"""Segments from which on the tiled CPU path is the faster one; below it has too many pieces."""


MASKED = 256
"""Segments up to which packed ones are one call with a mask; above, the calls are by documents."""


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor],
    begins: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention inside each document of a segment.

    Args:
        q: [batch, segments, n, heads, d], before rotary.
        k, v: [batch, segments, n, kv_heads, d], before rotary.
        rotary: cos and sin, each [n, d / 2].
        begins: as in Layout, [batch, segments, n]; None: each segment is of one document. Padding
            counts as documents of one token.

    Returns:
        [batch, segments, n, heads, d].
    """
    if q.is_cpu and torch.get_num_threads() == 1 and q.shape[2] >= LONG:
        return local_attention_cpu(q, k, v, *rotary, begins)
    group = q.shape[3] // k.shape[3]
    positions = None if begins is None else positions_of(begins)
    q, k = rotate(q, *rotary, positions), rotate(k, *rotary, positions)
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=3) for x in (k, v))
    if begins is not None and q.shape[2] > MASKED:
        return _by_runs(q, k, v, runs_of(begins))
    mask = None if begins is None else _mask(begins, q.dtype)
    batch = q.shape[0]
    q, k, v = (rearrange(x, "b s n h d -> (b s) h n d") for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
    return rearrange(out, "(b s) h n d -> b s n h d", b=batch)


def _mask(begins: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Returns what is added to scores, [batch x segments, 1, n, n]; None if nothing is packed."""

    def make() -> Tensor | None:
        if not begins.any():
            return None
        n = begins.shape[-1]
        own = torch.minimum(begins, torch.arange(n, device=begins.device)).flatten(0, 1)
        return unseen(n, own).to(begins.device, dtype)[:, None]

    return made_once(begins, ("mask", dtype), make)


def _by_runs(q: Tensor, k: Tensor, v: Tensor, runs: list[list[Run]]) -> Tensor:
    """Attention of each run by itself, q, k and v [b, s, n, h, d]."""
    calls = _calls(runs, q.shape[2])
    sizes = [count * rows for count, rows, _ in calls]
    outputs = []
    for (count, _, begins), *own in zip(
        calls, *(x.flatten(0, 2).split(sizes) for x in (q, k, v)), strict=True
    ):
        mask = None if begins is None else unseen(len(begins), begins).to(q)
        own = (rearrange(x, "(c n) h d -> c h n d", c=count) for x in own)
        out = F.scaled_dot_product_attention(*own, mask, is_causal=mask is None)
        outputs.append(rearrange(out, "c h n d -> (c n) h d"))
    return torch.cat(outputs).view(q.shape)


def _calls(runs: list[list[Run]], n: int) -> list[tuple[int, int, Tensor | None]]:
    """How many pieces of how many rows are one call, and where the documents of a run begin.

    Segments that are one document, and follow each other, are one call.
    """
    calls: list[tuple[int, int, Tensor | None]] = []
    for whole, segments in itertools.groupby(runs, lambda own: own[0].is_whole(n)):
        if whole:
            calls.append((len(list(segments)), n, None))
        else:
            calls += [(1, run.end - run.start, run.begins) for own in segments for run in own]
    return calls
