"""The specification of Infini-attention, segment by segment and with explicit scores.

It follows section 2 of Munkhdalai, Faruqui, Gopal 2024, arXiv 2404.07143. Every faster path agrees
with it in outputs, final memory and all gradients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from infini_ds.layout import Layout, document_begins, memory_tokens
from infini_ds.memory import RULES
from infini_ds.memory.state import MemoryState


class Inputs(NamedTuple):
    """One window, the argument of every implementation of Infini-attention."""

    q: Tensor
    """[batch, segments, n, heads, d], before rotary."""
    k: Tensor
    """[batch, segments, n, kv_heads, d], before rotary."""
    v: Tensor
    """[batch, segments, n, kv_heads, d]."""
    w: Tensor | None
    """[batch, segments, n, kv_heads], write weights in [0, 1]; None means 1."""
    memory: MemoryState
    """The memory before the window."""
    layout: Layout
    """Document starts and valid lengths."""
    beta: Tensor
    """[heads], the gates of eq. (6)."""
    rule: str
    """Name of the memory rule, a key of `memory.RULES`."""
    rotary: tuple[Tensor, Tensor]
    """cos and sin, each [n, d / 2], or with `previous` [n of previous + n, d / 2]."""
    previous: Tensor | None = None
    """[batch, segments, segment_length, 2 kv_heads, d]: of a sliding window, keys before rotary and
    values of the segment before each one, zero where the document has no token there. A segment's
    first document attends to them as far as segment_length tokens back. None: no window."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary positions (Su et al. 2021) to two halves of each head, as in Llama.

    x is [..., n, heads, d]; cos and sin are [..., n, d / 2].
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def infini_attention_reference(inputs: Inputs) -> tuple[Tensor, MemoryState]:
    """Attends inside each segment and to the memory of all earlier segments of its document.

    Returns:
        The output, [batch, segments, n, heads, d], and the memory after the window.
    """
    q, k, v, w, memory, layout, beta, rule, rotary, previous = inputs
    own = RULES[rule]
    _, segments, n, heads, d = q.shape
    group = heads // k.shape[3]
    position = torch.arange(n, device=q.device)
    begins = document_begins(layout)
    if begins is None:
        begins = torch.zeros(1, dtype=torch.int32, device=q.device).expand(*layout.starts.shape, n)
    gate = beta.sigmoid().to(q.dtype)[:, None]  # [heads, 1]
    outputs = []
    for s in range(segments):
        memory = memory.cleared(layout.starts[:, s])
        first = memory_tokens(layout, n)[:, s, :, None]  # [batch, n, 1], of the first document

        begin = begins[:, s]  # [batch, n]
        in_document = position - begin
        cos, sin = (table[in_document] for table in rotary)  # [batch, n, d / 2]
        local_q = rotate(q[:, s], cos, sin)
        local_k = rotate(k[:, s], cos, sin).repeat_interleave(group, dim=2)
        local_v = v[:, s].repeat_interleave(group, dim=2)
        scores = torch.einsum("b i h d, b j h d -> b h i j", local_q, local_k) / d**0.5
        seen = (begin[..., None] <= position) & (position <= position[:, None])  # [batch, n, n]
        if previous is not None:
            earlier_k, earlier_v = previous[:, s].to(k.dtype).chunk(2, dim=2)
            width = earlier_k.shape[1]
            # A token's distance to the earlier ones is its position here, as their first is at 0.
            cos, sin = (table[width : width + n] for table in rotary)
            far_q = rotate(q[:, s], cos, sin)
            cos, sin = (table[:width] for table in rotary)
            far_k = rotate(earlier_k, cos, sin).repeat_interleave(group, dim=2)
            far = torch.einsum("b i h d, b j h d -> b h i j", far_q, far_k) / d**0.5
            scores = torch.cat((far, scores), dim=-1)
            there = (earlier_k != 0).flatten(2).any(dim=-1)[:, None]  # [batch, 1, width]
            if layout.begins is not None:  # documents that are packed behind the first see none
                there = there & (layout.begins[:, s] == 0)[..., None]
            near = torch.arange(width, device=q.device) > position[:, None]  # [n, width]
            seen = torch.cat((there & near, seen), dim=-1)
            local_v = torch.cat((earlier_v.repeat_interleave(group, dim=2), local_v), dim=1)
        attention = scores.masked_fill(~seen[:, None], float("-inf")).softmax(dim=-1)
        a_dot = torch.einsum("b h i j, b j h d -> b i h d", attention, local_v)

        features_q = own.features(q[:, s]).to(memory.kv.dtype)
        a_mem = own.read(features_q, memory).to(q.dtype)  # eq. (3)
        written = own.written(memory).repeat_interleave(group, dim=1)[:, None, :, None]
        mixed = gate * a_mem + (1 - gate) * a_dot  # eq. (6)
        if layout.begins is not None:
            written = written & first[..., None]  # documents that are packed behind it read nothing
        outputs.append(torch.where(written, mixed, a_dot))

        weight = first.to(memory.kv.dtype).expand(v.shape[0], n, v.shape[3])
        if w is not None:
            weight = weight * w[:, s].to(memory.kv.dtype)
        features_k = own.features(k[:, s]).to(memory.kv.dtype)
        memory = own.write(memory, features_k, weight, v[:, s].to(memory.kv.dtype))
    return torch.stack(outputs, dim=1), memory
