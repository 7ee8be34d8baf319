"""Reads the memory and mixes the result with local attention, as one operation.

For the backward pass only queries, local output and memories are kept, which exist anyway. Features
and reads are recomputed.
"""

from torch import Tensor

from infini_ds.kernels.infini_attention.divided_read import DividedReadAndMix
from infini_ds.kernels.infini_attention.mixed_rows import Readers
from infini_ds.kernels.infini_attention.normalized_read import NormalizedReadAndMix
from infini_ds.layout import Layout
from infini_ds.memory import RULES, MemoryState
from infini_ds.memory.gated_delta import GatedDelta


def read_and_mix(
    a_dot: Tensor,
    q: Tensor,
    states: MemoryState,
    beta: Tensor,
    rule: str,
    layout: Layout | None = None,
) -> Tensor:
    """Computes a rule's read and eq. (6), and returns A_dot alone where the memory is empty.

    Args:
        a_dot, q: [batch, segments, n, heads, d]; the queries of a group read one memory.
        states: the memory before each segment, kv [batch, segments, kv_heads, f, d] and norm
            [batch, segments, kv_heads, f], or 0 in place of f by rules that do not divide.
        beta: [heads].
        rule: name of the memory rule.
        layout: if segments are packed, only the tokens of their first documents read; None: all.

    Returns:
        [batch, segments, n, heads, d].
    """
    own, readers = RULES[rule], Readers.of(layout, q.shape[2])
    a_dot, flat_q, *flat = (x.flatten(0, 1) for x in (a_dot, q, *states))
    state = MemoryState(*flat)
    written = own.written(state).repeat_interleave(q.shape[3] // state.kv.shape[1], dim=1)
    gate = beta.float().sigmoid() * written  # [segments, heads]
    if isinstance(own, GatedDelta):
        out = NormalizedReadAndMix.apply(a_dot, flat_q, state.kv, gate, readers, own.shifts)
    else:
        out = DividedReadAndMix.apply(a_dot, flat_q, *state, gate, readers)
    return out.view(q.shape)  # type: ignore[union-attr]
