"""The attention layer, which puts projections around Infini-attention."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from infini_ds.config import ModelConfig
from infini_ds.config.model import LARGEST_GATE
from infini_ds.kernels.infini_attention import Inputs, infini_attention
from infini_ds.kernels.infini_attention.memory_read import read_and_mix
from infini_ds.kernels.infini_attention.parallel import memory_scan
from infini_ds.kernels.local_attention import local_attention, rotate, within_reach
from infini_ds.layout import Layout, memory_tokens, valid_tokens
from infini_ds.memory import MemoryState
from infini_ds.memory.hand_on import Change, Exchange, HandOn
from infini_ds.model.memory import OpenSegment
from infini_ds.model.norm import RMSNorm
from infini_ds.model.rotary import rotary_table
from infini_ds.model.short_conv import ShortConv, of_earlier_tokens
from infini_ds.model.write_gate import WriteGate, WriteStats, nothing_written, write_stats

Method = TypeVar("Method", bound=Callable)


def _not_compiled(method: Method) -> Method:
    """Excludes a method from torch.compile, which generates failing code for matrix products of
    unknown sizes (torch 2.13). The code around the method is still compiled."""

    @functools.wraps(method)
    def call(*args):
        if torch.compiler.is_compiling():
            return torch.compiler.disable(method)(*args)  # importing it takes a second
        return method(*args)

    return call  # type: ignore[return-value]


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """Turns autocast off, because the memory is computed in fp32 whatever the projections use."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class _WithZeroGradient(torch.autograd.Function):
    """Returns a tensor as it is, and gives a parameter that has no part in it a gradient."""

    @staticmethod
    def forward(ctx, tensor: Tensor, parameter: Tensor) -> Tensor:
        ctx.save_for_backward(parameter)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return gradients[0], torch.zeros_like(ctx.saved_tensors[0])


class InfiniAttention(nn.Module):
    """Attends locally inside each segment and reads the memory of all earlier segments, if the
    layer has one.

    A layer without a memory has gates too, which are closed and have a gradient of zero: all stages
    of a pipeline then have the same groups of parameters.

    Args:
        config: that of the layer, see `ModelConfig.of_layer`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        heads = config.num_heads + 2 * config.kv_heads
        self.qkv_proj = nn.Linear(
            config.hidden_size, heads * config.head_dim, bias=config.attention_bias
        )
        self.o_proj = nn.Linear(
            config.num_heads * config.head_dim, config.hidden_size, bias=config.attention_out_bias
        )
        self.q_norm = self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
        self.has_memory = bool(config.memory_layers)
        self.ablated = False
        """Whether nothing reads or writes the memory, see `block.memory_ablated`."""
        gate = config.gate_init if self.has_memory else -LARGEST_GATE
        self.beta = nn.Parameter(torch.full((config.num_heads,), gate))
        channels = heads * config.head_dim
        taps = config.memory.short_conv
        self.short_conv = ShortConv(channels, taps) if taps else None
        writes = self.has_memory and config.memory.write_gate
        self.write_gate = WriteGate(config) if writes else None
        self._rotary: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def begin_with_induction(self) -> None:
        """With a convolution, makes keys equal to queries of earlier tokens.

        A query then finds what followed its own token earlier in the document, in local attention
        and in the memory, from the first step on: a layer is an induction head (Olsson et al. 2022,
        arXiv 2209.11895) by a shift of its keys (Xu et al. 2024, arXiv 2411.19574).

        Half the channels of each key hold the token before, and the others tokens farther back. All
        hold a tenth of the key's own token, or the first key of a document would be zero, and the
        gradient of its direction a thousand times that of others.

        The first two query heads of a group have the key's projection. Those with even numbers hold
        their own token in all channels, and so find it anywhere in a key. Those with odd numbers
        hold what the key of the next token holds before itself, and so find the same sequence.
        """
        if self.short_conv is None:
            return
        d, heads, kv_heads = self.config.head_dim, self.config.num_heads, self.config.kv_heads
        projections = self.qkv_proj.weight.unflatten(0, (-1, d))
        filters = self.short_conv.weight.unflatten(0, (-1, d))
        earlier = of_earlier_tokens(d, self.short_conv.taps).to(filters)
        group = heads // kv_heads
        filters[heads : heads + kv_heads] = earlier
        filters[heads : heads + kv_heads, :, -1] = 0.1
        for head in range(heads):
            if head % group < 2:
                projections[head] = projections[heads + head // group]
                if head % 2:
                    filters[head] = earlier.roll(1, dims=-1)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Maps [..., hidden_size] to queries, keys and values [..., heads + 2 kv_heads, d], and to
        the write gate's input [..., kv_heads] in fp32, None without a write gate."""
        qkv = self.qkv_proj(hidden).unflatten(-1, (-1, self.config.head_dim))
        return qkv, None if self.write_gate is None else self.write_gate(hidden)

    @_not_compiled
    def forward(
        self,
        qkv: Tensor,
        w: Tensor | None,
        layout: Layout,
        memory: MemoryState,
        exchange: Exchange | None = None,
    ) -> tuple[Tensor, MemoryState, WriteStats | None]:
        """Processes whole segments at once, which may be packed.

        Args:
            qkv, w: what `project` makes of [batch, segments x n, hidden_size], where n is
                segment_length, or anything shorter for a single segment.
            layout: document starts and valid lengths.
            memory: the memory before the first segment.
            exchange: if other ranks have the other parts of the same window, the way to them; the
                memories before and after are then those of the whole window.

        Returns:
            The output [batch, segments x n, hidden_size], the memory after the last segment, and
            statistics of what was written, None if the model has no write gates.
        """
        segments, tail = layout.starts.shape[1], None
        qkv = rearrange(qkv, "b (s n) h d -> b s n h d", s=segments)
        n = qkv.shape[2]
        if self.short_conv is not None:
            before, tail = self._tails(qkv, layout, memory.tail, exchange)
            qkv = self._convolved(self.short_conv, qkv, layout, before)
        q, k, v = self._split(qkv)
        previous, window = None, None
        if memory.window is not None:
            previous, window = self._windows(k, v, layout, memory.window, exchange)
        stats = self._nothing_written(qkv.device)
        if self.write_gate is not None:
            assert w is not None
            w = self.write_gate.weights(rearrange(w, "b (s n) h -> b s n h", s=segments), k)
            stats = write_stats(w, valid_tokens(layout, n))
        rule, state = self.config.memory_rule, memory.compressed()
        rotary = self._rotary_table(qkv.device, n)
        with _without_autocast(qkv.device):
            if self.has_memory and not self.ablated:
                inputs = Inputs(q, k, v, w, state, layout, self.beta, rule, rotary, previous)
                out, memory = infini_attention(inputs, exchange)
            else:
                out = local_attention(q, k, v, rotary, layout.begins, previous)
                out = _WithZeroGradient.apply(out, self.beta)
        out = self.o_proj(rearrange(out, "b s n h d -> b (s n) (h d)"))
        return out, replace(memory, tail=tail, window=window), stats

    @_not_compiled
    def extend(
        self,
        hidden: Tensor,
        memory: MemoryState,
        segment: OpenSegment,
        positions: Tensor,
        used: int,
    ) -> tuple[Tensor, OpenSegment, WriteStats | None]:
        """Adds a few tokens to a segment that is not full yet, without writing to the memory.

        Args:
            hidden: [batch, t, hidden_size].
            memory: the memory before the segment.
            segment: the tokens of the segment that were read earlier.
            positions: [batch, t], places of the new tokens in the segment.
            used: length of the fullest row's segment, including the new tokens.

        Returns:
            The output, the segment with the new tokens in place, and statistics of how much of
            them will be written, None if the model has no write gates.
        """
        keys, values, weights, tail = segment
        qkv, w = self.project(hidden)
        if self.short_conv is not None:
            qkv, tail = self.short_conv(qkv, tail)
        q, k, v = (x.to(keys.dtype) for x in self._split(qkv))
        stats = self._nothing_written(hidden.device)
        if self.write_gate is not None:
            assert w is not None
            w = self.write_gate.weights(w, k)
            weights = weights.scatter(1, positions[..., None].expand_as(w), w)
            stats = write_stats(w, torch.ones_like(positions, dtype=torch.bool))
        index = positions[..., None, None].expand_as(k)
        keys, values = keys.scatter(1, index, k), values.scatter(1, index, v)
        cos, sin = self._rotary_table(hidden.device, used)
        seen = torch.arange(used, device=hidden.device) <= positions[..., None]  # [b, t, used]
        seen_k, seen_v, behind = keys[:, :used], values[:, :used], 0
        if memory.window is not None:
            earlier_k, earlier_v = memory.window.to(keys.dtype).chunk(2, dim=2)
            behind = earlier_k.shape[1]
            seen = torch.cat((within_reach(earlier_k, positions), seen), dim=-1)
            seen_k, seen_v = torch.cat((earlier_k, seen_k), 1), torch.cat((earlier_v, seen_v), 1)
        places = behind + positions
        states = memory.compressed().map(lambda tensor: tensor[:, None])
        with _without_autocast(hidden.device):
            a_dot = F.scaled_dot_product_attention(
                rearrange(rotate(q, cos[places], sin[places]), "b t h d -> b h t d"),
                rearrange(rotate(seen_k, cos, sin), "b n h d -> b h n d"),
                rearrange(seen_v, "b n h d -> b h n d"),
                attn_mask=seen[:, None],
                enable_gqa=self.config.num_heads != self.config.kv_heads,
            )
            out = rearrange(a_dot, "b h t d -> b 1 t h d")
            if self.has_memory and not self.ablated:
                out = read_and_mix(out, q[:, None], states, self.beta, self.config.memory_rule)
        out = self.o_proj(rearrange(out, "b 1 t h d -> b t (h d)"))
        return out, OpenSegment(keys, values, weights, tail), stats

    def close(self, memory: MemoryState, segment: OpenSegment) -> MemoryState:
        """Writes a full segment into the memory."""
        writes = self.has_memory and not self.ablated
        after = self._written(memory.compressed(), segment) if writes else memory
        window = memory.window
        if window is not None:
            window = torch.cat((segment.keys, segment.values), dim=2).to(window.dtype)
        return replace(after, tail=memory.tail, window=window)

    def _written(self, memory: MemoryState, segment: OpenSegment) -> MemoryState:
        """Returns the compressive memory after a full segment."""
        keys, values = segment.keys[:, None], segment.values[:, None]
        w = None if self.write_gate is None else segment.weights[:, None]
        batch, _, n = keys.shape[:3]
        layout = Layout(
            torch.zeros(batch, 1, dtype=torch.bool, device=keys.device),
            torch.full((batch, 1), n, dtype=torch.int32, device=keys.device),
        )
        with _without_autocast(keys.device):
            return memory_scan(keys, values, w, memory, layout, self.config.memory_rule)[1]

    def _nothing_written(self, device: torch.device) -> WriteStats | None:
        """Returns the statistics of a layer without a memory, if others have write gates."""
        return nothing_written(device) if self.config.memory.write_gate else None

    def _tails(
        self, qkv: Tensor, layout: Layout, tail: Tensor | None, exchange: Exchange | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the tokens that the convolution sees before each segment, and after the window.

        Args:
            qkv: whole segments, [batch, segments, n, heads + 2 kv_heads, d].
            tail: [batch, taps, heads + 2 kv_heads, d] fp32, the tokens before the window.

        Returns:
            [batch, segments, taps, ...] in qkv's type, zeros where a document begins, and
            [batch, taps, ...] in fp32.
        """
        assert tail is not None
        taps = tail.shape[1]
        starts = layout.starts[..., None, None, None]
        ends = (tail.masked_fill(starts[:, 0], 0), qkv[:, -1, -taps:])  # a segment may be shorter
        after = torch.cat(ends, dim=1)[:, -taps:].float()
        if exchange is not None:
            replaced = Change(after.new_zeros(len(after)), [after])
            (tail,), (after,) = HandOn(replaced, exchange).finish([tail])
        before = torch.cat((tail[:, None].to(qkv.dtype), qkv[:, :-1, -taps:]), dim=1)
        return before.masked_fill(starts, 0), after

    @staticmethod
    def _windows(
        k: Tensor, v: Tensor, layout: Layout, window: Tensor, exchange: Exchange | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the keys and values before each segment, and those that follow the window of
        segments, which are its last segment's.

        Args:
            k, v: whole segments, [batch, segments, n, kv_heads, d].
            window: [batch, segment_length, 2 kv_heads, d] fp32, those before the first segment.

        Returns:
            [batch, segments, segment_length, 2 kv_heads, d] in k's type, zeros where a document
            begins, and [batch, segment_length, 2 kv_heads, d] in fp32.
        """
        own = torch.cat((k, v), dim=3)
        own = own.masked_fill(~memory_tokens(layout, k.shape[2])[..., None, None], 0)
        after = own[:, -1].float()
        if after.shape[1] < window.shape[1]:  # of one segment, which may be shorter
            kept = window.masked_fill(layout.starts[:, 0, None, None, None], 0)
            after = torch.cat((kept, after), dim=1)[:, -window.shape[1] :]
        if exchange is not None:
            replaced = Change(after.new_zeros(len(after)), [after])
            (window,), (after,) = HandOn(replaced, exchange).finish([window])
        previous = window[:, None].to(k.dtype)
        if k.shape[1] > 1:
            previous = torch.cat((previous, own[:, :-1]), dim=1)
        return previous.masked_fill(layout.starts[..., None, None, None], 0), after

    @staticmethod
    def _convolved(short_conv: ShortConv, qkv: Tensor, layout: Layout, before: Tensor) -> Tensor:
        """Whole segments [batch, segments, n, heads + 2 kv_heads, d], and `_tails` before them."""
        if layout.begins is not None:
            return short_conv.packed(qkv, layout.begins, before)
        return short_conv(qkv, before)[0]

    def _split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Returns queries [..., heads, d], keys and values [..., kv_heads, d].

        With qk_norm, queries and keys are normalised both for the memory and for local attention.
        """
        heads, kv_heads = self.config.num_heads, self.config.kv_heads
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=-2)
        return self.q_norm(q), self.k_norm(k), v

    def _rotary_table(self, device: torch.device, tokens: int) -> tuple[Tensor, Tensor]:
        """Returns cos and sin for so many tokens of a segment, and for all that a sliding window
        sees before them, [..., d / 2]."""
        if self._rotary is None or self._rotary[0].device != device:
            with torch.inference_mode(False):  # training may use the table later
                self._rotary = rotary_table(self.config, device)
        cos, sin = self._rotary
        end = len(cos) - self.config.segment_length + tokens
        return cos[:end], sin[:end]
