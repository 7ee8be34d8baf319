"""The layers of an Infini-Transformer (arXiv 2404.07143) for transformers.

Each layer attends inside a segment and reads a compressive memory of all earlier segments, so the
state kept of a text does not grow with it. Shapes: b batch, t tokens, h heads, g key-value heads,
d width of a head.

    M, z        memory and its normaliser, [b, g, d, d] and [b, g, d]; sums and reads are fp32 too
    sigma(x)    elu(x) + 1
    read        sigma(q) M / (sigma(q) z), mixed with local attention by sigmoid(beta) of the head
    linear      M + sigma(k)^T v
    delta       M + sigma(k)^T (v - sigma(k) M / (sigma(k) z))

By the other rules there is no z; unit(x) is x divided by its L2 norm, and phi(x) the products of
each element of relu([x, -x]) with those 1, 2 and 3 places before it, [6 d].

    read        unit(q) M, divided by its root mean square and mixed in the same way
    gated_delta M + unit(k)^T (v - unit(k) M), token by token
    gated_delta_dpfp, the same with phi(q) and phi(k) in place of q and k; M is [b, g, 6 d, d]
"""

import contextlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_infini import InfiniConfig

EPSILON = 1e-10  # smallest denominator of a read
KEY_EPSILON = 1e-6  # added to the squared length of a key of gated_delta
READ_EPSILON = 1e-3  # added to the mean square of a read of gated_delta
CHUNK = 64  # number of tokens that gated_delta writes at once


class Piece(NamedTuple):
    """Where tokens [b, t] stand, each row's inside one segment; rows are texts of any length."""

    used: list[int]  # tokens of the open segment that each row has read already
    new: list[int]  # tokens that each row reads now; what follows them is padding
    begun: list[bool]  # whether the row's text has a segment before this one

    @property
    def even(self) -> bool:
        """Whether all rows stand at the same place and read equally much."""
        return len(set(zip(*self))) == 1  # noqa: B905

    @property
    def after(self) -> list[int]:
        """Tokens of its open segment that each row has read after this."""
        return [used + new for used, new in zip(self.used, self.new)]  # noqa: B905

    def places(self, t: int, device: torch.device) -> Tensor:
        """Returns the place of each token in its segment, [b, t], or [1, t] if rows are even."""
        used = self.used[:1] if self.even else self.used
        return torch.tensor(used, device=device)[:, None] + torch.arange(t, device=device)

    def append(self, before: Tensor | None, new: Tensor) -> Tensor:
        """Puts tokens [b, t, ...] behind those of their row's open segment, [b, tokens, ...]."""
        if self.even:
            return new if before is None else torch.cat((before, new), dim=1)
        end, shape = max(self.after), new.shape[2:]
        places = self.places(new.shape[1], new.device)
        read = torch.tensor(self.after, device=new.device)[:, None]
        places = places.where(places < read, end)  # padding goes behind the end
        room = new.new_zeros(len(new), end + 1, *shape)
        if before is not None:
            room = torch.cat((before.to(new.dtype), room[:, before.shape[1] :]), dim=1)
        places = places.view(*places.shape, *(1 for _ in shape)).expand_as(new)
        return room.scatter(1, places, new)[:, :end]


@dataclass
class LayerState:
    """The state of one layer, its memory and the unfinished segment: tensors or None.

    Where texts have unequal lengths, a row has zeros for a memory that is empty, and anything
    behind the tokens of its open segment.
    """

    kv: Any = None  # M
    norm: Any = None  # z; None by the gated delta rules
    keys: Any = None  # [b, tokens so far, g, d], before rotary
    values: Any = None
    weights: Any = None  # [b, tokens so far, g], how much of each will be written
    tail: Any = None  # [b, taps, h + 2 g, d], the last tokens before the convolution
    window: Any = None  # [b, segment_length, 2 g, d], keys and values of the segment before

    def select(self, rows: Tensor) -> None:
        for name, tensor in vars(self).items():
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, rows.to(tensor.device)))


class WriteGate(nn.Linear):
    """Gives each token and key-value head a write weight in [0, 1]."""

    def __init__(self, config: InfiniConfig):
        kv_heads = config.num_key_value_heads
        super().__init__(config.hidden_size, kv_heads)
        self.key_weight = None
        if config.write_gate_sees_keys:
            self.key_weight = nn.Parameter(torch.zeros(kv_heads, config.head_dim))

    def forward(self, hidden: Tensor, k: Tensor) -> Tensor:
        """Maps [b, t, hidden_size] and keys [b, t, g, d] to [b, t, g] in fp32."""
        logits = super().forward(hidden).float()
        if self.key_weight is not None:
            logits = logits + torch.einsum("bthd,hd->bth", k, self.key_weight).float()
        return F.hardsigmoid(logits)


class InfiniAttention(nn.Module):
    def __init__(self, config: InfiniConfig, layer: int):
        super().__init__()
        self.config = config
        self.has_memory = config.memory_layers is None or layer in config.memory_layers
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
        if config.write_gate and self.has_memory:
            self.write_gate = WriteGate(config)

    def forward(
        self, hidden: Tensor, state: LayerState, rotary: tuple[Tensor, Tensor], piece: Piece
    ) -> Tensor:
        """Reads tokens [b, t, hidden_size] that continue an open segment without exceeding it."""
        batch, t = hidden.shape[:2]
        qkv = self.qkv_proj(hidden).unflatten(-1, (-1, self.head_dim))
        if self.short_conv is not None:
            qkv, state.tail = self.short_conv(qkv, state.tail, piece)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        q, k = self.q_norm(q), self.k_norm(k)
        w = hidden.new_ones(batch, t, self.kv_heads, dtype=torch.float32)
        if self.write_gate is not None:
            w = self.write_gate(hidden, k)
        state.keys, state.values = piece.append(state.keys, k), piece.append(state.values, v)
        state.weights = piece.append(state.weights, w)
        out = self._local(q, state, rotary, piece)
        if state.kv is not None:
            out = self._mixed(out, q, state.kv, state.norm)
        after, n = piece.after, self.config.segment_length
        if full := [row for row, read in enumerate(after) if read == n]:
            with _in_fp32(hidden.device):
                self._write(state, full)
            left = max((read for row, read in enumerate(after) if row not in full), default=0)
            state.keys, state.values, state.weights = (
                x[:, :left] if left else None for x in (state.keys, state.values, state.weights)
            )
        return self.o_proj(out.flatten(2))

    def _local(self, q: Tensor, state: LayerState, rotary, piece: Piece) -> Tensor:
        keys, values, earlier = state.keys, state.values, 0
        if state.window is not None:
            earlier = state.window.shape[1]
            earlier_k, earlier_v = state.window.chunk(2, dim=2)
            keys = torch.cat((earlier_k, keys), dim=1)
            values = torch.cat((earlier_v, values), dim=1)
        seen, t = keys.shape[1], q.shape[1]
        cos, sin = (table[:, None].to(q.dtype) for table in rotary)
        k = _rotate(keys, cos[:seen], sin[:seen]).transpose(1, 2)
        v = values.transpose(1, 2)
        group = self.heads // self.kv_heads
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        if seen == t and piece.even:
            q = _rotate(q, cos[:seen], sin[:seen]).transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        places = (earlier + piece.places(t, q.device)).clamp(max=len(cos) - 1)
        q = _rotate(q, cos[places], sin[places]).transpose(1, 2)
        place, column = places[..., None], torch.arange(seen, device=q.device)
        mask = (column <= place) & (column > place - self.config.segment_length)
        if earlier and not piece.even:
            begun = torch.tensor(piece.begun, device=q.device)[:, None, None]
            mask = mask & (begun | (column >= earlier))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
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

    def _write(self, state: LayerState, full: list[int]) -> None:
        """Compresses the open segments of these rows, which are full, into their memories."""
        if self.config.use_sliding_window:
            window = torch.cat((state.keys, state.values), dim=2)
            state.window = _with_rows(state.window, _rows(window, full), full, len(window))
        if not self.has_memory:
            return
        keys, values, weights = _rows(state.keys, full), _rows(state.values, full), state.weights
        features = self.rule.features(keys.float()).transpose(1, 2)
        kv, norm = self.rule.write(
            _rows(state.kv, full),
            _rows(state.norm, full),
            features,
            _rows(weights, full).transpose(1, 2)[..., None],
            values.float().transpose(1, 2),
        )
        state.kv = _with_rows(state.kv, kv, full, len(weights))
        state.norm = _with_rows(state.norm, norm, full, len(weights))


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

    shifts = 0  # of phi; 0: unit(x) alone

    def features(self, x: Tensor) -> Tensor:
        if self.shifts:
            x = torch.cat((x, -x), dim=-1).relu()
            rolled = (x.roll(shift, dims=-1) for shift in range(1, self.shifts + 1))
            x = torch.cat([x * other for other in rolled], dim=-1)
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


class GatedDeltaDPFP(GatedDelta):
    """The same with phi of queries and keys."""

    shifts = 3


RULES = {
    "linear": Linear,
    "delta": Delta,
    "gated_delta": GatedDelta,
    "gated_delta_dpfp": GatedDeltaDPFP,
}


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


def _rows(x: Tensor | None, rows: list[int]) -> Any:
    if x is None or rows == list(range(len(x))):
        return x
    return x[rows]


def _with_rows(before: Tensor | None, new: Tensor | None, rows: list[int], batch: int):
    """Returns the tensor of all rows after these have changed; None stands for zeros."""
    if new is None or rows == list(range(batch)):
        return new
    if before is None:
        before = new.new_zeros(batch, *new.shape[1:])
    return before.index_copy(0, torch.tensor(rows, device=new.device), new)


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

    def forward(self, x: Tensor, before: Tensor | None, piece: Piece) -> tuple[Tensor, Tensor]:
        *earlier, own = self.weight.mT.unflatten(1, x.shape[2:])
        taps = len(earlier)
        if before is None:
            before = x.new_zeros(x.shape[0], taps, *x.shape[2:])
        seen = torch.cat((before, x), dim=1)
        out = own * x
        for place, tap in enumerate(earlier):
            out = torch.addcmul(out, tap, seen.narrow(1, place, x.shape[1]))
        if piece.even:
            return out, seen[:, -taps:]
        new = torch.tensor(piece.new, device=x.device)[:, None]
        places = (new + torch.arange(taps, device=x.device))[..., None, None]
        return out, seen.gather(1, places.expand(-1, -1, *x.shape[2:]))


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


class TokenEmbedding(nn.Embedding):
    """The embedding, which is the head as well where weights are tied."""

    def forward(self, given: Tensor, as_head: bool = False) -> Tensor:
        """Returns the vectors of token ids, or as head the logits of hidden states."""
        if as_head:
            return F.linear(given.to(self.weight.device), self.weight)
        return super().forward(given)


class InfiniBlock(GradientCheckpointingLayer):
    def __init__(self, config: InfiniConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = InfiniAttention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, piece: Piece, *before: Tensor | None
    ) -> tuple:
        """Returns hidden states and the fields of a new LayerState; the given one stays unchanged.

        This way the block can be recomputed in the backward pass. All tensors are separate
        arguments, as re-entrant checkpointing requires.
        """
        state = LayerState(*before)
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), state, (cos, sin), piece)
        hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return (hidden, *vars(state).values())
