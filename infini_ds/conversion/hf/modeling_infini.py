"""An Infini-Transformer (arXiv 2404.07143) for transformers, in one file.

Each layer attends inside a segment and reads a compressive memory of all segments before it, so
what is kept of a text does not grow with it. Shapes: b batch, t tokens, h heads, g key-value heads,
d width of a head.

    M, z        memory and its normaliser, [b, g, d, d] and [b, g, d], fp32, as are sums and reads
    sigma(x)    elu(x) + 1
    read        sigma(q) M / (sigma(q) z), mixed with local attention by sigmoid(beta) of the head
    linear      M + sigma(k)^T v
    delta       M + sigma(k)^T (v - sigma(k) M / (sigma(k) z))
"""

import contextlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_infini import InfiniConfig

TAPS = 4  # tokens that a short convolution looks back
EPSILON = 1e-10  # least denominator of a read
IGNORED = -100  # label of a token without a loss


@dataclass
class LayerState:
    """What one layer keeps, the memory and the segment that is not full yet: tensors or None."""

    kv: Any = None  # M
    norm: Any = None  # z
    keys: Any = None  # [b, tokens so far, g, d], before rotary
    values: Any = None
    weights: Any = None  # [b, tokens so far, g], how much of each will be written
    tail: Any = None  # [b, TAPS, h + 2 g, d], the last tokens before the convolution

    def select(self, rows: Tensor) -> None:
        for name, tensor in vars(self).items():
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, rows.to(tensor.device)))


@dataclass
class InfiniCache:
    """What the model keeps of a text: of constant size, however long the text is.

    Give it to another call of the model to go on with the text. For `generate` give all tokens of
    the text: those that are in the cache are not read again. A call changes it; copy.deepcopy
    keeps it as it is, to ask several questions about one text.
    """

    layers: list[LayerState] = field(default_factory=list)
    tokens: int = 0  # read so far
    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for layer in self.layers:
            layer.select(beam_idx)


class InfiniAttention(nn.Module):
    def __init__(self, config: InfiniConfig):
        super().__init__()
        self.config = config
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
            self.short_conv = ShortConv(channels)
        if config.write_gate:
            self.write_gate = nn.Linear(config.hidden_size, self.kv_heads)

    def forward(self, hidden: Tensor, state: LayerState, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Tokens [b, t, hidden_size] that go on with an open segment and do not exceed it."""
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
        out = self._local(q, keys, values, rotary)
        if state.norm is not None:
            out = self._mixed(out, q, state.kv, state.norm)
        if keys.shape[1] == self.config.segment_length:
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
            causal = torch.ones(used, used, dtype=torch.bool, device=q.device).tril()[begin:]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=causal)
        return out.transpose(1, 2)  # [b, t, h, d]

    def _mixed(self, local: Tensor, q: Tensor, kv: Tensor, norm: Tensor) -> Tensor:
        grouped = q.unflatten(2, (self.kv_heads, -1))  # [b, t, g, queries of a group, d]
        sigma_q = F.elu(grouped.float()) + 1
        with _in_fp32(q.device):  # fp16 ends below what the memory's sums reach
            denominator = torch.einsum("btgqd,bgd->btgq", sigma_q, norm).clamp(min=EPSILON)
            read = torch.einsum("btgqd,bgde->btgqe", sigma_q, kv)
        read = (read / denominator[..., None]).to(q.dtype).flatten(2, 3)
        written = (norm.sum(-1) > 0).repeat_interleave(self.heads // self.kv_heads, dim=1)
        gate = (self.beta.float().sigmoid() * written)[:, None, :, None].to(q.dtype)
        return gate * read + (1 - gate) * local

    def _write(self, state: LayerState) -> None:
        """Compresses the open segment, which is full."""
        sigma_k = F.elu(state.keys.float()).transpose(1, 2) + 1  # [b, g, n, d]
        weighted_k = sigma_k * state.weights.transpose(1, 2)[..., None]
        values = state.values.float().transpose(1, 2)
        added = weighted_k.sum(dim=2)
        if state.norm is None:
            state.kv, state.norm = weighted_k.mT @ values, added
        else:
            if self.config.memory_rule == "delta":
                denominator = (sigma_k @ state.norm[..., None]).clamp(min=EPSILON)
                damping = _damping(sigma_k, weighted_k, state.norm, added, denominator)
                values = values - damping[..., None, None] * (sigma_k @ state.kv / denominator)
            state.kv, state.norm = state.kv + weighted_k.mT @ values, state.norm + added
        state.keys = state.values = state.weights = state.tail = None


@torch.no_grad()
def _damping(sigma_k, weighted_k, norm, added, denominator) -> Tensor:
    """[b, g]: how much of what is read back may be subtracted, so that the memory does not grow.

    A segment multiplies M by I - c G, G = sum of w sigma(k)^T sigma(k) / (sigma(k) z), with no
    negative entry: its largest eigenvalue is at most max(G x / x) of any positive x, and c brings
    it down to 2 where it is larger, as after a short first segment.
    """
    x = added
    for _ in range(2):
        previous, x = x, (weighted_k.mT @ (sigma_k @ x[..., None] / denominator))[..., 0]
    bound = (x / previous.clamp(min=EPSILON)).amax(dim=-1)
    damping = (2 / bound.clamp(min=EPSILON)).clamp(max=1)
    return torch.where(norm.sum(-1) > 0, damping, torch.zeros_like(damping))


def _in_fp32(device: torch.device):
    """Keeps autocast from the memory, which is fp32 whatever the rest is computed in."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _append(before: Tensor | None, new: Tensor) -> Tensor:
    return new if before is None else torch.cat((before, new), dim=1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class ShortConv(nn.Module):
    """x_t + sum over i of c_i x_(t - i), c_i of each channel; nothing before a segment."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, TAPS))

    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        if before is None:
            before = x.new_zeros(x.shape[0], TAPS, *x.shape[2:])
        seen = torch.cat((before, x), dim=1)
        taps = self.weight.mT.unflatten(1, x.shape[2:])
        out = x
        for back, tap in enumerate(taps, start=1):
            out = torch.addcmul(out, tap, seen.narrow(1, TAPS - back, x.shape[1]))
        return out, seen[:, -TAPS:]


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


class InfiniBlock(nn.Module):
    def __init__(self, config: InfiniConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = InfiniAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, hidden: Tensor, state: LayerState, rotary: tuple[Tensor, Tensor]) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), state, rotary)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class InfiniForCausalLM(PreTrainedModel, GenerationMixin):
    """Its layers are the embedding, the blocks, the final norm, and the head if it has its own."""

    config_class = InfiniConfig
    _no_split_modules = ["InfiniBlock"]  # noqa: RUF012
    _is_stateful = True  # what was read cannot be taken back
    _supports_sdpa = True

    def __init__(self, config: InfiniConfig):
        super().__init__(config)
        layers: list[nn.Module] = [nn.Embedding(config.vocab_size, config.hidden_size)]
        layers += [InfiniBlock(config) for _ in range(config.num_hidden_layers)]
        layers.append(nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps))
        if not config.tie_word_embeddings:
            layers.append(nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias))
        self.layers = nn.ModuleList(layers)
        self._rotary: tuple[Tensor, Tensor] | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.layers[0]

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.config.tie_word_embeddings else self.layers[-1]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # it makes an InfiniCache itself

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: InfiniCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ):
        """Reads tokens [b, any length] after what is in the cache, a part of a segment at a time.

        Args:
            attention_mask: all ones; rows of a batch have the same length.
            labels: as input_ids, -100 where there is no loss.
            use_cache: whether to return the cache; by default it is, unless in training.
            logits_to_keep: of so many last tokens; 0: of all.
            output_hidden_states: whether to return what goes into each block, and the final norm's
                result; of all tokens.
            output_attentions: must be false, there is no matrix of them.
        """
        if output_attentions:
            raise ValueError("output_attentions must be false: the memory is read without any")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if attention_mask is not None and not bool((attention_mask == 1).all()):
            raise ValueError(
                "attention_mask must be all ones: padding would be read as text; put texts of one "
                "length into a batch"
            )
        cache = past_key_values or InfiniCache()
        if not cache.layers:
            cache.layers = [LayerState() for _ in range(self.config.num_hidden_layers)]
        n, length = self.config.segment_length, input_ids.shape[1]
        wanted_from = length - logits_to_keep if logits_to_keep else 0
        logits, states, begin = [], [], 0
        while begin < length:
            end = min(length, begin + n - cache.tokens % n)
            inner = [] if output_hidden_states else None
            hidden = self._read(input_ids[:, begin:end], cache, inner)
            if end > wanted_from:
                logits.append(self._head(hidden[:, max(wanted_from - begin, 0) :]))
            if inner is not None:
                states.append((*inner, hidden))
            begin = end
        logits = torch.cat(logits, dim=1)
        loss = None
        if labels is not None:
            targets = labels[:, 1:].to(logits.device)
            loss = F.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED
            )
        hidden_states = None
        if states:
            hidden_states = tuple(torch.cat(parts, dim=1) for parts in zip(*states))  # noqa: B905
        keep = not self.training if use_cache is None else use_cache
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache if keep else None,  # type: ignore[arg-type]
            hidden_states=hidden_states,
        )
        return output if return_dict is not False else output.to_tuple()

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if seen >= input_ids.shape[1]:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens, the cache has read {seen}: give the "
                "whole text, at least one token longer"
            )
        return {
            "input_ids": input_ids[:, seen:].to(self.device),
            "past_key_values": past_key_values,
            "attention_mask": kwargs.get("attention_mask"),
            "use_cache": kwargs.get("use_cache"),
            "logits_to_keep": kwargs.get("logits_to_keep", 1),
        }

    def _read(self, tokens: Tensor, cache: InfiniCache, inner: list[Tensor] | None) -> Tensor:
        """Final hidden states of tokens that fit into the open segment.

        What goes into each block is put into `inner`, if it is a list.
        """
        hidden = self.layers[0](tokens)
        rotary = self._rotary_table(hidden.device)
        for layer, state in zip(self.layers[1:], cache.layers):  # noqa: B905, norm and head follow
            if inner is not None:
                inner.append(hidden)
            hidden = layer(hidden, state, rotary)
        cache.tokens += tokens.shape[1]
        return self.layers[1 + self.config.num_hidden_layers](hidden)

    def _head(self, hidden: Tensor) -> Tensor:
        if self.config.tie_word_embeddings:
            weight: Tensor = self.layers[0].weight  # type: ignore[assignment]
            return F.linear(hidden.to(weight.device), weight)  # which may be on another device
        return self.layers[-1](hidden)

    def _rotary_table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of the positions in a segment, [n, d / 2]; they restart in each."""
        if self._rotary is None or self._rotary[0].device != device:
            config = self.config
            exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
            frequencies = config.rotary_base**-exponents
            if config.rotary_scaling:
                frequencies = _scaled(frequencies, config.rotary_scaling)
            positions = torch.arange(config.segment_length, dtype=torch.float64)
            angles = positions[:, None] * frequencies
            with torch.inference_mode(False):  # training may use it later
                angles = angles.clone()
                self._rotary = angles.cos().float().to(device), angles.sin().float().to(device)
        return self._rotary


def _scaled(frequencies: Tensor, scaling: dict) -> Tensor:
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    # Llama 3.1: low frequencies are divided by the factor, high ones kept, a blend in between.
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
