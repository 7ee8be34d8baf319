"""The layers of an Infini-Transformer (arXiv 2404.07143) for transformers.

Each layer attends inside a segment and reads a compressive memory of all earlier segments, so the
state kept of a text does not grow with it. Shapes: b batch, t tokens, h heads, g key-value heads,
d width of a head.

    M, z        memory and its normaliser, [b, g, d, d] and [b, g, d]; sums and reads are fp32 too
    sigma(x)    elu(x) + 1
    read        sigma(q) M / (sigma(q) z), mixed with local attention by sigmoid(beta) of the head
    linear      M + sigma(k)^T v
    delta       M + sigma(k)^T (v - sigma(k) M / (sigma(k) z))

By the third rule there is no z; unit(x) is x divided by its L2 norm.

    read        unit(q) M, divided by its root mean square and mixed in the same way
    gated_delta M + unit(k)^T (v - unit(k) M), token by token
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_infini import InfiniConfig

EPSILON = 1e-10  # smallest denominator of a read
KEY_EPSILON = 1e-6  # added to the squared length of a key of gated_delta
READ_EPSILON = 1e-3  # added to the mean square of a read of gated_delta
CHUNK = 64  # number of tokens that gated_delta writes at once


@dataclass
class LayerState:
    """The state of one layer, its memory and the unfinished segment: tensors or None."""

    kv: Any = None  # M
    norm: Any = None  # z; None by gated_delta
    keys: Any = None  # [b, tokens so far, g, d], before rotary
    values: Any = None
    weights: Any = None  # [b, tokens so far, g], how much of each will be written
    tail: Any = None  # [b, taps, h + 2 g, d], the last tokens before the convolution
    window: Any = None  # [b, segment_length, 2 g, d], keys and values of the segment before

    def select(self, rows: Tensor) -> None:
        for name, tensor in vars(self).items():
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, rows.to(tensor.device)))


class InfiniAttention(nn.Module):
    def __init__(self, config: InfiniConfig):
        super().__init__()
        self.config = config
        self.rule = RULES[config.memory_rule]()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        channels = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, channels, bias=config.attention_bias)
        self.o_proj = nn.Linear(
            self.heads * self.head_dim, config.hidden_size, bias=config.attention_out_bias
        )
        self.q_norm = self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.beta = nn.Parameter(torch.zeros(self.heads))
        self.short_conv = self.write_gate = None
        if config.short_conv:
            self.short_conv = ShortConv(channels, config.short_conv)
        if config.write_gate:
            self.write_gate = nn.Linear(config.hidden_size, self.kv_heads)

    def forward(self, hidden: Tensor, state: LayerState, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Reads tokens [b, t, hidden_size] that continue an open segment without exceeding it."""
        batch, t = hidden.shape[:2]
        qkv = self.qkv_proj(hidden).unflatten(-1, (-1, self.head_dim))
        if self.short_conv is not None:
            qkv, state.tail = self.short_conv(qkv, state.tail)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        q, k = self.q_norm(q), self.k_norm(k)
        w = hidden.new_ones(batch, t, self.kv_heads, dtype=torch.float32)
        if self.write_gate is not None:
            w = F.hardsigmoid(self.write_gate(hidden).float())
        keys, values = _append(state.keys, k), _append(state.values, v)
        state.keys, state.values, state.weights = keys, values, _append(state.weights, w)
        if state.window is not None:
            earlier_k, earlier_v = state.window.chunk(2, dim=2)
            keys, values = _append(earlier_k, keys), _append(earlier_v, values)
        out = self._local(q, keys, values, rotary)
        if state.kv is not None:
            out = self._mixed(out, q, state.kv, state.norm)
        if state.keys.shape[1] == self.config.segment_length:
            if self.config.use_sliding_window:
                state.window = torch.cat((state.keys, state.values), dim=2)
            with _in_fp32(keys.device):
                self._write(state)
        return self.o_proj(out.flatten(2))

    def _local(self, q: Tensor, keys: Tensor, values: Tensor, rotary) -> Tensor:
        used = keys.shape[1]
        begin = used - q.shape[1]
        cos, sin = (table[:used, None].to(q.dtype) for table in rotary)
        q = _rotate(q, cos[begin:], sin[begin:]).transpose(1, 2)
        k = _rotate(keys, cos, sin).transpose(1, 2)
        v = values.transpose(1, 2)
        group = self.heads // self.kv_heads
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        if begin == 0:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            seen = torch.ones(used, used, dtype=torch.bool, device=q.device).tril()
            seen = seen.triu(1 - self.config.segment_length)[begin:]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return out.transpose(1, 2)  # [b, t, h, d]

    def _mixed(self, local: Tensor, q: Tensor, kv: Tensor, norm: Tensor | None) -> Tensor:
        grouped = q.unflatten(2, (self.kv_heads, -1))  # [b, t, g, queries of a group, d]
        features = self.rule.features(grouped.float())
        with _in_fp32(q.device):  # the memory's sums exceed the range of fp16
            read, written = self.rule.read(features, kv, norm)
        read = read.to(q.dtype).flatten(2, 3)
        written = written.repeat_interleave(self.heads // self.kv_heads, dim=1)
        gate = (self.beta.float().sigmoid() * written)[:, None, :, None].to(q.dtype)
        return gate * read + (1 - gate) * local

    def _write(self, state: LayerState) -> None:
        """Compresses the open segment, which is full, into the memory."""
        features = self.rule.features(state.keys.float()).transpose(1, 2)
        weights = state.weights.transpose(1, 2)[..., None]
        values = state.values.float().transpose(1, 2)
        state.kv, state.norm = self.rule.write(state.kv, state.norm, features, weights, values)
        state.keys = state.values = state.weights = None


class Linear:
    """The paper's first rule, and what both of its rules share."""

    def features(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1

    def read(self, features: Tensor, kv: Tensor, norm) -> tuple[Tensor, Tensor]:
        """Returns reads [b, t, g, queries of a group, d], and [b, g]: whether anything is stored.

        Args:
            features: of the queries, [b, t, g, queries of a group, d].
        """
        denominator = torch.einsum("btgqd,bgd->btgq", features, norm).clamp(min=EPSILON)
        read = torch.einsum("btgqd,bgde->btgqe", features, kv)
        return read / denominator[..., None], norm.sum(-1) > 0

    def write(self, kv, norm, features: Tensor, weights: Tensor, values: Tensor) -> tuple:
        """Returns M and z after a segment.

        Args:
            kv, norm: M and z before it, None if nothing has been written yet.
            features, values: of the keys, and the values, [b, g, n, d].
            weights: [b, g, n, 1].
        """
        weighted = features * weights
        added = weighted.sum(dim=2)
        if norm is None:
            return weighted.mT @ values, added
        left = self.left(kv, norm, features, weighted, values)
        return kv + weighted.mT @ left, norm + added

    def left(self, kv, norm, features: Tensor, weighted: Tensor, values: Tensor) -> Tensor:
        """Returns what is left to store of the values."""
        return values


class Delta(Linear):
    """The paper's second rule."""

    def left(self, kv, norm, features: Tensor, weighted: Tensor, values: Tensor) -> Tensor:
        denominator = (features @ norm[..., None]).clamp(min=EPSILON)
        damping = _damping(features, weighted, norm, weighted.sum(dim=2), denominator)
        return values - damping[..., None, None] * (features @ kv / denominator)


class GatedDelta:
    """The rule that divides by nothing; its methods are those of `Linear`, without z."""

    def features(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + KEY_EPSILON)

    def read(self, features: Tensor, kv: Tensor, norm: None) -> tuple[Tensor, Tensor]:
        read = torch.einsum("btgqd,bgde->btgqe", features, kv)
        scale = torch.rsqrt(read.square().mean(dim=-1, keepdim=True) + READ_EPSILON)
        return read * scale, (kv != 0).flatten(2).any(dim=-1)

    def write(self, kv, norm: None, features: Tensor, weights: Tensor, values: Tensor) -> tuple:
        if kv is None:
            kv = torch.zeros_like(features[:, :, :1].mT @ values[:, :, :1])
        chunks = (x.split(CHUNK, dim=2) for x in (features, weights, values))
        for k, w, v in zip(*chunks):  # noqa: B905
            system = (w * (k @ k.mT)).tril(-1)  # a token's value is reduced by all before it
            new = torch.linalg.solve_triangular(
                system, w * (v - k @ kv), upper=False, unitriangular=True
            )
            kv = kv + k.mT @ new
        return kv, None


RULES = {"linear": Linear, "delta": Delta, "gated_delta": GatedDelta}


@torch.no_grad()
def _damping(sigma_k, weighted_k, norm, added, denominator) -> Tensor:
    """Returns [b, g]: the share of what is read back that may be subtracted without growth.

    A segment multiplies M by I - c G, where G, the sum of w sigma(k)^T sigma(k) / (sigma(k) z), has
    no negative entry. Its largest eigenvalue is thus at most max(G x / x) for any positive x, and c
    brings that bound down to 2 where it is larger, as after a short first segment.
    """
    x = added
    for _ in range(2):
        previous, x = x, (weighted_k.mT @ (sigma_k @ x[..., None] / denominator))[..., 0]
    bound = (x / previous.clamp(min=EPSILON)).amax(dim=-1)
    damping = (2 / bound.clamp(min=EPSILON)).clamp(max=1)
    return torch.where(norm.sum(-1) > 0, damping, torch.zeros_like(damping))


def _in_fp32(device: torch.device):
    """Switches autocast off for the memory, which is fp32 whatever the rest is computed in."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _append(before: Tensor | None, new: Tensor) -> Tensor:
    return new if before is None else torch.cat((before, new), dim=1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class ShortConv(nn.Module):
    """Computes the sum over i from 0 to taps of c_i x_(t - i), with c_i per channel, c_0 last."""

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps + 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begins as the identity."""
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.weight[:, -1])

    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        *earlier, own = self.weight.mT.unflatten(1, x.shape[2:])
        taps = len(earlier)
        if before is None:
            before = x.new_zeros(x.shape[0], taps, *x.shape[2:])
        seen = torch.cat((before, x), dim=1)
        out = own * x
        for place, tap in enumerate(earlier):
            out = torch.addcmul(out, tap, seen.narrow(1, place, x.shape[1]))
        return out, seen[:, -taps:]


class FeedForward(nn.Module):
    def __init__(self, config: InfiniConfig):
        super().__init__()
        self.act = {"silu": F.silu, "gelu": F.gelu}[config.hidden_act]
        size, bias = config.intermediate_size, config.mlp_bias
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * size, bias=bias)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(self.act(gate) * up)


class InfiniBlock(GradientCheckpointingLayer):
    def __init__(self, config: InfiniConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = InfiniAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, *before: Tensor | None) -> tuple:
        """Returns hidden states and the fields of a new LayerState; the given one stays unchanged.

        This way the block can be recomputed in the backward pass. All tensors are separate
        arguments, as re-entrant checkpointing requires.
        """
        state = LayerState(*before)
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), state, (cos, sin))
        hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return (hidden, *vars(state).values())
