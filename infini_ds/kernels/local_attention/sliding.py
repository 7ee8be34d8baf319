"""Local attention that sees the segment before each one too, as a sliding window."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from infini_ds.kernels.local_attention.rotary import rotate
from infini_ds.layout import begins_with_padding


def sliding_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor],
    previous: Tensor,
    begins: Tensor | None = None,
) -> Tensor:
    """Computes `local_attention` over each segment and the one before it.

    A token attends to as many tokens as `previous` has for a segment, itself included, as far as
    they are of its document.

    Args:
        q: [batch, segments, t, heads, d], before rotary.
        k, v: [batch, segments, t, kv_heads, d], before rotary.
        rotary: cos and sin, each [n + t, d / 2].
        previous: [batch, segments, n, 2 kv_heads, d], as in `Inputs`.
        begins: as in `local_attention`.

    Returns:
        [batch, segments, t, heads, d].
    """
    n = previous.shape[2]
    earlier_k, earlier_v = previous.to(k.dtype).chunk(2, dim=3)
    mask = seen_before(earlier_k, q.shape[2], begins)
    # Only distances matter, so that positions need not begin anew with each document.
    q = rotate(q, rotary[0][n:], rotary[1][n:])
    k = rotate(torch.cat((earlier_k, k), dim=2), *rotary)
    v = torch.cat((earlier_v, v), dim=2)
    group = q.shape[3] // k.shape[3]
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=3) for x in (k, v))
    batch = q.shape[0]
    q, k, v = (rearrange(x, "b s n h d -> (b s) h n d") for x in (q, k, v))
    added = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
    added = added.masked_fill_(~mask, float("-inf")).flatten(0, 1)[:, None]
    out = F.scaled_dot_product_attention(q, k, v, added)
    return rearrange(out, "(b s) h n d -> b s n h d", b=batch)


def seen_before(earlier_k: Tensor, t: int, begins: Tensor | None) -> Tensor:
    """Tells which tokens of the segment before and of its own each token attends to.

    Args:
        earlier_k: [batch, segments, n, kv_heads, d], zero where there is no token.
        t: tokens of a segment.
        begins: as in `local_attention`.

    Returns:
        bool [batch, segments, t, n + t].
    """
    place = torch.arange(t, device=earlier_k.device)
    earlier = within_reach(earlier_k, place)
    own = place <= place[:, None]  # [t, t]
    if begins is None:
        return torch.cat((earlier, own.expand(*earlier.shape[:2], t, t)), dim=-1)
    first = (begins == 0)[..., None]  # [batch, segments, t, 1]
    in_document = begins_with_padding(begins)[..., None] <= place
    return torch.cat((earlier & first, own & in_document), dim=-1)


def within_reach(earlier_k: Tensor, place: Tensor) -> Tensor:
    """Tells which tokens of the segment before each token attends to.

    Args:
        earlier_k: [..., n, kv_heads, d], zero where there is no token.
        place: [..., t], places of the tokens in their segment.

    Returns:
        bool [..., t, n].
    """
    there = (earlier_k != 0).flatten(-2).any(dim=-1)[..., None, :]
    near = torch.arange(earlier_k.shape[-3], device=place.device) > place[..., None]
    return there & near
