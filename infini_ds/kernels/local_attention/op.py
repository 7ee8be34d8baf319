"""Chooses the implementation of local attention."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from infini_ds.kernels.local_attention.cpu import local_attention_cpu
from infini_ds.kernels.local_attention.rotary import rotate

LONG = 512
"""Segment length from which the tiled CPU path is faster; shorter segments are too many pieces."""


def local_attention(q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Computes causal softmax attention inside each segment, without a whole score matrix.

    Args:
        q: [batch, segments, n, heads, d], before rotary.
        k, v: [batch, segments, n, kv_heads, d], before rotary.
        rotary: cos and sin, each [n, d / 2].

    Returns:
        [batch, segments, n, heads, d].
    """
    if q.is_cpu and torch.get_num_threads() == 1 and q.shape[2] >= LONG:
        return local_attention_cpu(q, k, v, *rotary)
    group = q.shape[3] // k.shape[3]
    q, k = rotate(q, *rotary), rotate(k, *rotary)
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=3) for x in (k, v))
    batch = q.shape[0]
    q, k, v = (rearrange(x, "b s n h d -> (b s) h n d") for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return rearrange(out, "(b s) h n d -> b s n h d", b=batch)
