"""Infini-attention over all segments of a window at once, in PyTorch.

By the linear rule, what a segment writes depends only on its own keys and values. The sums of all
segments are therefore one batched product, the memories that segments read are an exclusive scan
over those sums, and all reads are another batched product. The delta rule has to go from segment to
segment, but only over matrices [d, d]. Memories are fp32 whatever the compute type.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_ds.kernels.infini_attention.memory_read import read_and_mix
from infini_ds.kernels.infini_attention.reference import Inputs
from infini_ds.kernels.infini_attention.segment_overlaps import segment_overlaps
from infini_ds.kernels.infini_attention.segment_sums import segment_sums
from infini_ds.kernels.local_attention import local_attention
from infini_ds.layout import Layout, memory_tokens
from infini_ds.memory.state import MemoryState


def infini_attention_parallel(inputs: Inputs) -> tuple[Tensor, MemoryState]:
    """Computes the results of `infini_attention_reference` for all segments at once."""
    q, k, v, w, memory, layout, beta, rule, rotary = inputs
    a_dot = local_attention(q, k, v, rotary, layout.begins)
    states, final = memory_scan(k, v, w, memory, layout, rule)
    return read_and_mix(a_dot, q, states, beta, layout), final


def memory_scan(
    k: Tensor, v: Tensor, w: Tensor | None, memory: MemoryState, layout: Layout, rule: str
) -> tuple[MemoryState, MemoryState]:
    """Computes the memory that each segment reads, and the memory after the window.

    Args:
        k, v: [batch, segments, n, kv_heads, d].
        w: [batch, segments, n, kv_heads] or None.

    Returns:
        The memory before each segment, kv [batch, segments, kv_heads, d, d] and norm [batch,
        segments, kv_heads, d], and the memory after the last one.
    """
    n = k.shape[2]
    weight = memory_tokens(layout, n)[..., None].float().expand(k.shape[:-1])
    if w is not None:
        weight = weight * w.float()
    added = segment_sums(k, v, weight)
    norm, final_norm = scan(added.norm, memory.norm, layout.starts)
    if rule == "linear":
        kv, final_kv = scan(added.kv, memory.kv, layout.starts)
    else:
        overlaps = segment_overlaps(k, weight, norm, added.norm.detach())
        kv, final_kv = walk(added.kv, overlaps, memory.kv, layout.starts)
    return MemoryState(kv, norm), MemoryState(final_kv, final_norm)


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
    for s in range(starts.shape[1]):
        kv = kv.masked_fill(starts[:, s, None, None, None], 0)
        before.append(kv)
        kv = kv + added[:, s] - overlaps[:, s] @ kv
    return torch.stack(before, dim=1), kv
