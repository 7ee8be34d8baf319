"""The specification of Infini-attention: segment by segment, scores written out, no tricks.

Munkhdalai, Faruqui, Gopal 2024, arXiv 2404.07143, section 2. Every faster path agrees with this
one on outputs, final memory and every gradient.
"""

import torch
from torch import Tensor

from infini_ds.layout import Layout
from infini_ds.memory.state import EPSILON, LayerMemory


def sigma(x: Tensor) -> Tensor:
    """The feature map of the memory: elu + 1, always positive."""
    return torch.nn.functional.elu(x) + 1


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021), in two halves as in Llama.

    x [..., n, heads, d]; cos and sin [n, d / 2].
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def infini_attention_reference(
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
    """Attends inside each segment and to the memory of all earlier segments of its document.

    Args:
        q: [batch, segments, n, heads, d], before rotary.
        k, v: [batch, segments, n, kv_heads, d], before rotary.
        w: [batch, segments, n, kv_heads], write weights in [0, 1]; None means 1.
        memory: of the segments before this window.
        layout: document starts and valid lengths.
        beta: [heads], gates of eq. (6).
        rule: "linear", eq. (4), or "delta", eq. (5).
        rotary: cos and sin, each [n, d / 2].

    Returns:
        The output, [batch, segments, n, heads, d], and the memory after the window.
    """
    _, segments, n, heads, d = q.shape
    group = heads // k.shape[3]
    cos, sin = rotary
    causal = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    gate = beta.sigmoid().to(q.dtype)[:, None]  # [heads, 1]
    kv, norm = memory
    outputs = []
    for s in range(segments):
        started = layout.starts[:, s]  # [batch]
        kv = kv.masked_fill(started[:, None, None, None], 0)
        norm = norm.masked_fill(started[:, None, None], 0)

        local_q = rotate(q[:, s], cos, sin)
        local_k = rotate(k[:, s], cos, sin).repeat_interleave(group, dim=2)
        local_v = v[:, s].repeat_interleave(group, dim=2)
        scores = torch.einsum("b i h d, b j h d -> b h i j", local_q, local_k) / d**0.5
        attention = scores.masked_fill(~causal, float("-inf")).softmax(dim=-1)
        a_dot = torch.einsum("b h i j, b j h d -> b i h d", attention, local_v)

        sigma_q = sigma(q[:, s]).to(kv.dtype)
        a_mem = _read(sigma_q, kv, norm).to(q.dtype)  # eq. (3)
        written = (norm.sum(-1) > 0).repeat_interleave(group, dim=1)[:, None, :, None]
        mixed = gate * a_mem + (1 - gate) * a_dot  # eq. (6)
        outputs.append(torch.where(written, mixed, a_dot))

        valid = torch.arange(n, device=q.device) < layout.lengths[:, s, None]  # [batch, n]
        weight = valid[..., None].to(kv.dtype)
        if w is not None:
            weight = weight * w[:, s].to(kv.dtype)
        sigma_k = sigma(k[:, s]).to(kv.dtype)
        weighted_k = sigma_k * weight[..., None]
        added_norm = weighted_k.sum(dim=1)
        values = v[:, s].to(kv.dtype)
        if rule == "delta":
            reads = torch.einsum("b n h k, b h k -> b n h", sigma_k, norm).clamp(min=EPSILON)
            overlap = torch.einsum(
                "b n h i, b n h j -> b h i j", weighted_k / reads[..., None], sigma_k
            )
            damping = delta_damping(overlap, norm, added_norm)[:, None, :, None]
            values = values - damping * _read(sigma_k, kv, norm)  # eq. (5)
        kv = kv + torch.einsum("b n h k, b n h v -> b h k v", weighted_k, values)  # eq. (4)
        norm = norm + added_norm
    return torch.stack(outputs, dim=1), LayerMemory(kv, norm)


@torch.no_grad()
def delta_damping(overlap: Tensor, norm: Tensor, added_norm: Tensor) -> Tensor:
    """The guard of the delta rule: the factor on what is subtracted, 1 wherever eq. (5) is stable.

    A segment multiplies the stored M by I - c G, with G = sum of w sigma(k)^T sigma(k) /
    (sigma(k) z), symmetric and positive semi-definite; M cannot grow by it as long as the largest
    eigenvalue of c G is at most 2. G has no negative entry, so by Collatz and Wielandt that
    eigenvalue is at most max(G x / x) for any positive x. We start from x = z, for which G z is
    the norm that the segment adds, and tighten the bound by two power steps. Where it exceeds 2
    (a segment that writes more than about twice what is stored, as after a short first segment),
    c brings it down to 2. The factor is a constant to the gradients.

    Args:
        overlap: [..., d, d], G.
        norm, added_norm: [..., d].

    Returns:
        [...], in [0, 1]; 0 where nothing is stored.
    """
    previous = (overlap @ added_norm[..., None])[..., 0]
    x = (overlap @ previous[..., None])[..., 0]
    bound = (x / previous.clamp(min=EPSILON)).amax(dim=-1)
    damping = (2 / bound.clamp(min=EPSILON)).clamp(max=1)
    return torch.where(norm.sum(-1) > 0, damping, torch.zeros_like(damping))


def _read(sigma_q: Tensor, kv: Tensor, norm: Tensor) -> Tensor:
    group = sigma_q.shape[2] // norm.shape[1]
    kv = kv.repeat_interleave(group, dim=1)
    norm = norm.repeat_interleave(group, dim=1)
    numerator = torch.einsum("b n h k, b h k v -> b n h v", sigma_q, kv)
    denominator = torch.einsum("b n h k, b h k -> b n h", sigma_q, norm)
    return numerator / denominator.clamp(min=EPSILON)[..., None]
