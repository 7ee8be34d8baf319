"""Infini-attention with all segments of a window at once, in PyTorch.

What a segment writes depends only on its own keys and values (linear rule), so the sums of all
segments are one batched product, the memories that segments read are an exclusive scan over those
sums, and all reads are one batched product again. The delta rule scans segment by segment.
Memories are fp32 whatever the compute type.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from infini_ds.kernels.infini_attention.memory_read import read_and_mix
from infini_ds.kernels.infini_attention.reference import delta_damping
from infini_ds.kernels.infini_attention.segment_sums import segment_sums
from infini_ds.kernels.infini_attention.state import EPSILON, LayerMemory
from infini_ds.kernels.local_attention import local_attention
from infini_ds.layout import Layout


def infini_attention_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    memory: LayerMemory,
    layout: Layout,
    beta: Tensor,
    rule: str,
    rotary: tuple[Tensor, Tensor],
) -> tuple[Tensor, LayerMemory]:
    """See `infini_attention_reference`: same arguments, same results."""
    a_dot = local_attention(q, k, v, rotary)
    states, final = memory_scan(k, v, w, memory, layout, rule)
    return read_and_mix(a_dot, q, states, beta), final


def memory_scan(
    k: Tensor, v: Tensor, w: Tensor | None, memory: LayerMemory, layout: Layout, rule: str
) -> tuple[LayerMemory, LayerMemory]:
    """The memory that each segment reads, and the one after the window.

    Args:
        k, v: [batch, segments, n, kv_heads, d].
        w: [batch, segments, n, kv_heads] or None.

    Returns:
        Before each segment: kv [batch, segments, kv_heads, d, d], norm [batch, segments,
        kv_heads, d]; and after the last.
    """
    n = k.shape[2]
    valid = torch.arange(n, device=k.device) < layout.lengths[..., None]  # [batch, segments, n]
    weight = valid[..., None].float().expand(k.shape[:-1])
    if w is not None:
        weight = weight * w.float()
    added = segment_sums(k, v, weight)
    if rule == "linear":
        return scan_linear(added, memory, layout.starts)
    sigma_k = rearrange(F.elu(k.float()) + 1, "b s n h k -> b s h n k")
    weighted_k = (sigma_k * rearrange(weight, "b s n h -> b s h n 1")).mT
    return scan_delta(sigma_k, weighted_k, added, memory, layout.starts)


def scan_linear(
    added: LayerMemory, memory: LayerMemory, starts: Tensor
) -> tuple[LayerMemory, LayerMemory]:
    """Exclusive scan over segments that restarts where documents do, eq. (4).

    A product with a matrix of zeros and ones: exact, so nothing of one document is left in
    another's memory, as there would be by subtracting cumulative sums.
    """
    segments = starts.shape[1]
    document = F.pad(starts, (1, 1)).cumsum(1)  # [batch, segments + 2]
    document[:, -1] = document[:, -2]  # the memory after the window is of its last document
    source, reader = document[:, :-1], document[:, 1:]  # incoming, then each segment; each, final
    before = torch.ones(segments + 1, segments + 1, dtype=torch.bool, device=starts.device).tril()
    same = (reader[:, :, None] == source[:, None, :]) & before
    same = same.float()  # [batch, segments + 1, segments + 1]

    def scan(own: Tensor, incoming: Tensor) -> tuple[Tensor, Tensor]:
        terms = torch.cat((incoming[:, None], own), dim=1)
        sums = (same @ terms.flatten(2)).view_as(terms)
        return sums[:, :-1], sums[:, -1]

    kv, final_kv = scan(added.kv, memory.kv)
    norm, final_norm = scan(added.norm, memory.norm)
    return LayerMemory(kv, norm), LayerMemory(final_kv, final_norm)


def scan_delta(
    sigma_k: Tensor, weighted_k: Tensor, added: LayerMemory, memory: LayerMemory, starts: Tensor
) -> tuple[LayerMemory, LayerMemory]:
    """Segment by segment, each writing only what its keys do not read back already, eq. (5).

    sigma_k [batch, segments, kv_heads, n, d]; weighted_k [batch, segments, kv_heads, d, n].
    """
    norms, final_norm = scan_linear(added, memory, starts)
    damping = delta_damping(sigma_k, weighted_k.mT, norms.norm, added.norm)[..., None, None]
    denominator = (sigma_k @ norms.norm[..., None]).clamp(min=EPSILON)  # [b, s, h, n, 1]
    kv = memory.kv
    before = []
    for s in range(starts.shape[1]):
        kv = kv.masked_fill(starts[:, s, None, None, None], 0)
        before.append(kv)
        read = sigma_k[:, s] @ kv / denominator[:, s]  # [b, h, n, d_v]
        kv = kv + added.kv[:, s] - weighted_k[:, s] @ (damping[:, s] * read)
    return (
        LayerMemory(torch.stack(before, dim=1), norms.norm),
        LayerMemory(kv, final_norm.norm),
    )
