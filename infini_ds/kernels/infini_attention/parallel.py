"""Infini-attention over all segments of a window at once, in PyTorch.

By the linear rule, what a segment writes depends only on its own keys and values. The sums of all
segments are therefore one batched product, the memories that segments read are an exclusive scan
over those sums, and all reads are another batched product. The delta rule has to go from segment to
segment, but only over matrices [d, d]. Memories are fp32 whatever the compute type.
"""

from torch import Tensor

from infini_ds.kernels.infini_attention.changes import CHANGES, LinearChanges, RemovingChanges
from infini_ds.kernels.infini_attention.memory_read import read_and_mix
from infini_ds.kernels.infini_attention.reference import Inputs
from infini_ds.kernels.infini_attention.scans import scan
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
        The memory before each segment, kv [batch, segments, kv_heads, f, d] and norm [batch,
        segments, kv_heads, f or 0], and the memory after the last one.
    """
    changes = _changes(k, v, w, layout, rule)
    norm, final_norm = scan(changes.added_norm, memory.norm, layout.starts)
    kv, final_kv = changes.states(memory.kv, norm, layout.starts)
    return MemoryState(kv, norm), MemoryState(final_kv, final_norm)


def memory_before_part(inputs: Inputs, exchange: Exchange) -> tuple[MemoryState, MemoryState]:
    """Returns the memory before this rank's part of a window, and the one after the whole window.

    The arguments are those of `infini_attention_parallel`.
    """
    return _Part(inputs, exchange).finish()


def _changes(
    k: Tensor, v: Tensor, w: Tensor | None, layout: Layout, rule: str
) -> LinearChanges | RemovingChanges:
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
        self._memory, self._starts = memory, layout.starts
        self._added: MemoryState | None = None
        goes_on = (~self._starts.any(dim=1)).float()
        if isinstance(changes, LinearChanges):
            self._added = MemoryState(changes.added_kv, changes.added_norm)
            sums = [self._sum_of_last_document(added) for added in self._added.compressed()]
            self._way = HandOn(Change(goes_on, sums), exchange)
            return
        self._norm, self._final_norm = memory.norm, memory.norm
        if changes.added_norm.numel():
            change = Change(goes_on, [self._sum_of_last_document(changes.added_norm)])
            (self._norm,), (self._final_norm,) = HandOn(change, exchange).finish([memory.norm])
        self._norms, _ = scan(changes.added_norm, self._norm, self._starts)
        self._maps, end = changes.maps(self._norms, self._starts)
        added, factor = self._split(end)
        self._way = HandOn(Change(factor, [added]), exchange)

    def finish(self) -> tuple[MemoryState, MemoryState]:
        """Returns the memory before the part and the one after the window."""
        if self._added is not None:
            before, final = self._way.finish([self._memory.kv, self._memory.norm])
            return MemoryState(*before), MemoryState(*final)
        (kv,), (final_kv,) = self._way.finish([self._memory.kv])
        return MemoryState(kv, self._norm), MemoryState(final_kv, self._final_norm)

    def found(self, before: MemoryState) -> MemoryState:
        """Returns the memory before each segment, as `memory_scan` does.

        Args:
            before: the memory before the part.
        """
        if self._added is not None:
            kv, _ = scan(self._added.kv, before.kv, self._starts)
            norm, _ = scan(self._added.norm, before.norm, self._starts)
            return MemoryState(kv, norm)
        added, factor = self._split(self._maps)
        return MemoryState(added + factor @ before.kv[:, None], self._norms)

    def _split(self, maps: Tensor) -> tuple[Tensor, ...]:
        """Splits maps [..., f, d + f] into B and A."""
        f, d = self._memory.kv.shape[-2:]
        return maps.split((d, f), dim=-1)

    def _sum_of_last_document(self, added: Tensor) -> Tensor:
        """Sums [batch, segments, ...] since the last segment in which a document begins."""
        later = self._starts.flip(1).cumsum(1).flip(1) - self._starts.int()
        last = (later == 0).to(added)[:, None]  # [batch, 1, segments]
        return (last @ added.flatten(2)).view(-1, *added.shape[2:])
