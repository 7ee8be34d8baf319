"""Infini-attention over all segments of a window at once, in PyTorch.

By the linear rule, what a segment writes depends only on its own keys and values. The sums of all
segments are therefore one batched product, the memories that segments read are an exclusive scan
over those sums, and all reads are another batched product. The delta rule has to go from segment to
segment, but only over matrices [d, d]. Memories are fp32 whatever the compute type.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from infini_ds.kernels.infini_attention.changes import CHANGES, Changes
from infini_ds.kernels.infini_attention.memory_read import read_and_mix
from infini_ds.kernels.infini_attention.reference import Inputs
from infini_ds.kernels.local_attention import local_attention
from infini_ds.layout import Layout, memory_tokens
from infini_ds.memory.hand_on import Change, Exchange, HandOn
from infini_ds.memory.state import MemoryState


def infini_attention_parallel(
    inputs: Inputs, exchange: Exchange | None = None
) -> tuple[Tensor, MemoryState]:
    """Computes the results of `infini_attention_reference` for all segments at once.

    Args:
        exchange: if given, the inputs are this rank's part of a window, and so is the output;
            `memory` is the memory before the whole window, and the one after it is returned.
    """
    q, k, v, w, memory, layout, beta, rule, rotary, previous = inputs
    if exchange is None:
        a_dot = local_attention(q, k, v, rotary, layout.begins, previous)
        states, final = memory_scan(k, v, w, memory, layout, rule)
    else:
        part = _Part(inputs, exchange)
        # While messages are on their way.
        a_dot = local_attention(q, k, v, rotary, layout.begins, previous)
        before, final = part.finish()
        states = part.found(before)
    return read_and_mix(a_dot, q, states, beta, rule, layout), final


def memory_scan(
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    memory: MemoryState,
    layout: Layout,
    rule: str,
) -> tuple[MemoryState, MemoryState]:
    """Computes the memory that each segment reads, and the memory after the window.

    Args:
        k, v: [batch, segments, n, kv_heads, d].
        w: [batch, segments, n, kv_heads] or None.

    Returns:
        The memory before each segment, kv [batch, segments, kv_heads, d, d] and norm [batch,
        segments, kv_heads, d or 0], and the memory after the last one.
    """
    changes = _changes(k, v, w, layout, rule)
    norm, final_norm = scan(changes.added.norm, memory.norm, layout.starts)
    added = changes.added.kv
    if changes.removes:
        kv, final_kv = walk(added, changes.overlaps(norm), memory.kv, layout.starts)
    else:
        kv, final_kv = scan(added, memory.kv, layout.starts)
    return MemoryState(kv, norm), MemoryState(final_kv, final_norm)


def memory_before_part(inputs: Inputs, exchange: Exchange) -> tuple[MemoryState, MemoryState]:
    """Returns the memory before this rank's part of a window, and the one after the whole window.

    The arguments are those of `infini_attention_parallel`.
    """
    return _Part(inputs, exchange).finish()


def _changes(k: Tensor, v: Tensor, w: Tensor | None, layout: Layout, rule: str) -> Changes:
    weight = memory_tokens(layout, k.shape[2])[..., None].float().expand(k.shape[:-1])
    if w is not None:
        weight = weight * w.float()
    return CHANGES[rule](k, v, weight)


class _Part:
    """One rank's part of a window, whose change of the memory is on its way to the other ranks.

    The paper's delta rule hands on the norm first, since overlaps depend on it. By delta rules,
    segments then find A S + B, where S is the memory before the part.
    """

    def __init__(self, inputs: Inputs, exchange: Exchange):
        k, v, w, memory, layout, rule = (
            inputs.k, inputs.v, inputs.w, inputs.memory, inputs.layout, inputs.rule
        )  # fmt: skip
        changes = _changes(k, v, w, layout, rule)
        added, self._added = changes.added, changes.added
        self._memory, self._starts = memory, layout.starts
        self._maps = None
        goes_on = (~self._starts.any(dim=1)).to(added.kv)
        if not changes.removes:
            self._way = HandOn(Change(goes_on, [*map(self._sum_of_last_document, added)]), exchange)
            return
        self._norm, self._final_norm = memory.norm, memory.norm
        if added.norm.numel():
            change = Change(goes_on, [self._sum_of_last_document(added.norm)])
            (self._norm,), (self._final_norm,) = HandOn(change, exchange).finish([memory.norm])
        self._norms, _ = scan(added.norm, self._norm, self._starts)
        d = k.shape[-1]
        self._maps, end = _WalkOfMaps.apply(  # type: ignore[misc]
            added.kv, changes.overlaps(self._norms), self._starts
        )
        self._way = HandOn(Change(end[..., d:], [end[..., :d]]), exchange)

    def finish(self) -> tuple[MemoryState, MemoryState]:
        """Returns the memory before the part and the one after the window."""
        if self._maps is None:
            before, final = self._way.finish([*self._memory])
            return MemoryState(*before), MemoryState(*final)
        (kv,), (final_kv,) = self._way.finish([self._memory.kv])
        return MemoryState(kv, self._norm), MemoryState(final_kv, self._final_norm)

    def found(self, before: MemoryState) -> MemoryState:
        """Returns the memory before each segment, as `memory_scan` does.

        Args:
            before: the memory before the part.
        """
        if self._maps is None:
            pairs = zip(self._added, before, strict=True)
            return MemoryState(*(scan(added, x, self._starts)[0] for added, x in pairs))
        added, factor = self._maps.chunk(2, dim=-1)
        return MemoryState(added + factor @ before.kv[:, None], self._norms)

    def _sum_of_last_document(self, added: Tensor) -> Tensor:
        """Sums [batch, segments, ...] since the last segment in which a document begins."""
        later = self._starts.flip(1).cumsum(1).flip(1) - self._starts.int()
        last = (later == 0).to(added)[:, None]  # [batch, 1, segments]
        return (last @ added.flatten(2)).view(-1, *added.shape[2:])


def scan(added: Tensor, incoming: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Scans over segments exclusively, eq. (4), and restarts where a document starts.

    The scan is a product with a matrix of zeros and ones. Differences of cumulative sums would
    leave rounding errors of one document in the memory of the next.

    Args:
        added: [batch, segments, ...], what each segment adds.
        incoming: [batch, ...], the state before the window.

    Returns:
        The state that each segment reads, and the state after the last segment.
    """
    segments = starts.shape[1]
    document = F.pad(starts, (1, 1)).cumsum(1)  # [batch, segments + 2]
    document[:, -1] = document[:, -2]  # the final memory is the last document's
    # Sources are the incoming state and the segments; readers are the segments and the final state.
    source, reader = document[:, :-1], document[:, 1:]
    before = torch.ones(segments + 1, segments + 1, dtype=torch.bool, device=starts.device).tril()
    same = (reader[:, :, None] == source[:, None, :]) & before
    terms = torch.cat((incoming[:, None], added), dim=1)  # [batch, segments + 1, ...]
    sums = (same.float() @ terms.flatten(2)).view_as(terms)
    return sums[:, :-1], sums[:, -1]


def walk(
    added: Tensor, overlaps: Tensor, incoming: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor]:
    """Works like `scan` for eq. (5), where each segment also subtracts `overlaps` @ the state."""
    kv = incoming
    before = []
    begins = starts[..., None, None, None]
    # Views that are taken one by one would each have a gradient as large as all of them.
    for begin, own, overlap in zip(*(x.unbind(1) for x in (begins, added, overlaps)), strict=True):
        kv = kv.masked_fill(begin, 0)
        before.append(kv)
        kv = kv + own - overlap @ kv
    return torch.stack(before, dim=1), kv


class _WalkOfMaps(torch.autograd.Function):
    """Walks like `walk` over the map of the memory before a part to that before each segment.

    Maps are [batch, segments, kv_heads, d, 2 d]: the left half of each is B, the right half A.
    Returns those before each segment and the one after the last, and keeps the former alone.
    """

    @staticmethod
    def forward(ctx, added, overlaps, starts):
        batch, segments, kv_heads, d, _ = added.shape
        maps = added.new_empty(batch, segments, kv_heads, d, 2 * d)
        state = torch.eye(d, 2 * d, dtype=added.dtype, device=added.device).roll(d, dims=1)
        state = state.expand(batch, kv_heads, d, 2 * d)
        for s in range(segments):
            found = state.masked_fill(starts[:, s, None, None, None], 0)
            maps[:, s] = found
            state = found - overlaps[:, s] @ found
            state[..., :d] += added[:, s]
        ctx.save_for_backward(maps, overlaps, starts)
        return maps, state

    @staticmethod
    @once_differentiable
    def backward(ctx, d_maps, d_end):
        maps, overlaps, starts = ctx.saved_tensors
        d_added, d_overlaps = torch.empty_like(overlaps), torch.empty_like(overlaps)
        d_state, d = d_end, overlaps.shape[-1]
        for s in reversed(range(maps.shape[1])):
            d_added[:, s] = d_state[..., :d]
            d_overlaps[:, s] = -d_state @ maps[:, s].mT
            d_state = d_state - overlaps[:, s].mT @ d_state + d_maps[:, s]
            d_state = d_state.masked_fill(starts[:, s, None, None, None], 0)
        return d_added, d_overlaps, None
