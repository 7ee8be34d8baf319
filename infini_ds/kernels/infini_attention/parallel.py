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

from infini_ds.kernels.infini_attention.reference import delta_damping
from infini_ds.kernels.infini_attention.state import EPSILON, LayerMemory
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
    return mix(a_dot, memory_read(q, states), states, beta), final


def mix(a_dot: Tensor, a_mem: Tensor, states: LayerMemory, beta: Tensor) -> Tensor:
    """eq. (6), and A_dot alone where the memory is empty; all [batch, segments, n, heads, d]."""
    group = a_dot.shape[3] // states.norm.shape[2]
    written = (states.norm.sum(-1) > 0).repeat_interleave(group, dim=2)  # [batch, segments, heads]
    gate = (beta.float().sigmoid() * written).to(a_dot.dtype)[:, :, None, :, None]
    return torch.lerp(a_dot, a_mem, gate)


def local_attention(q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Causal softmax attention inside each segment: [batch, segments, n, heads, d]."""
    batch, _, _, heads, _ = q.shape
    group = heads // k.shape[3]
    q, k = rotate(q, *rotary), rotate(k, *rotary)
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=3) for x in (k, v))
    q, k, v = (rearrange(x, "b s n h d -> (b s) h n d") for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return rearrange(out, "(b s) h n d -> b s n h d", b=batch)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in two halves; x [..., n, heads, d]; cos and sin [..., n, d / 2]."""
    cos, sin = (table.to(x.dtype).unsqueeze(-2) for table in (cos, sin))
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


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
    weight = valid[..., None].float()
    if w is not None:
        weight = weight * w.float()
    sigma_k = F.elu(k.float()) + 1
    weighted_k = rearrange(sigma_k * weight[..., None], "b s n h k -> b s h k n")
    v = rearrange(v.float(), "b s n h v -> b s h n v")
    added = LayerMemory(weighted_k @ v, weighted_k.sum(-1))
    if rule == "linear":
        return scan_linear(added, memory, layout.starts)
    sigma_k = rearrange(sigma_k, "b s n h k -> b s h n k")
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


def memory_read(q: Tensor, states: LayerMemory) -> Tensor:
    """eq. (3): [batch, segments, n, heads, d]; queries of a group read one memory."""
    kv_heads = states.norm.shape[2]
    sigma_q = rearrange(F.elu(q) + 1, "b s n (h g) d -> b s h (g n) d", h=kv_heads)
    numerator = sigma_q @ states.kv.to(q.dtype)
    denominator = sigma_q @ states.norm.to(q.dtype)[..., None]
    read = numerator / denominator.clamp(min=EPSILON)
    return rearrange(read, "b s h (g n) d -> b s n (h g) d", n=q.shape[2])
