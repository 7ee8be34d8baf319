"""Converts weights of `infini-transformer-pytorch`, the library this project started from.

The library's models differ from ours as follows. Rotary embedding pairs neighbouring channels where
ours pairs the two halves of a head; gates weight the local side (beta = -gate); the feed-forward
puts the value before the gate; all biases are on except in attention. The fused projection has
blocks of query, key and value in the same order as ours. Attention in both computes the same
function once the channels of queries and keys, and the memory's d_k axis, are permuted together.
"""

import re
from collections.abc import Mapping

import torch
from pydantic import ValidationError
from torch import Tensor

from infini_ds.config import ModelConfig
from infini_ds.conversion.pairs import Pair, same
from infini_ds.conversion.plain_config import explain
from infini_ds.errors import UserError
from infini_ds.memory import RULES
from infini_ds.memory.delta import Delta

# This buffer is the same in each of the library's models.
ROTARY = r"layers\.\d+\.0\.rotary_emb\.freqs"


def from_seed(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Converts the seed library's state_dict to ours.

    `config` must describe the same model, as `infer_config` returns it.
    """
    return {pair.ours: pair.join([state[name] for name in pair.theirs]) for pair in table(config)}


def to_seed(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Converts our state_dict to the seed library's, for a config that `check_config` accepts."""
    theirs = {}
    for pair in table(config):
        theirs |= zip(pair.theirs, pair.split(state[pair.ours]), strict=True)
    return theirs | rotary_buffers(config)


def table(config: ModelConfig) -> list[Pair]:
    """Pairs the library's tensors with ours, layer by layer."""
    order = half_order(config.head_dim)
    pairs = [same("layers.0.weight", "token_emb.weight")]
    for index in range(config.num_layers):
        mine = f"layers.{index + 1}"
        attention, feed_forward = f"layers.{index}.0", f"layers.{index}.1"
        pairs += [
            same(f"{mine}.input_layernorm.weight", f"{attention}.norm.gamma"),
            _heads(f"{mine}.self_attn.qkv_proj.weight", f"{attention}.to_qkv.weight", order),
            same(f"{mine}.self_attn.o_proj.weight", f"{attention}.to_out.weight"),
            _negated(f"{mine}.self_attn.beta", f"{attention}.fastweight_mem.head_gates"),
            same(f"{mine}.post_attention_layernorm.weight", f"{feed_forward}.norm.gamma"),
        ]
        for kind in ("weight", "bias"):
            pairs += [
                _halves(f"{mine}.mlp.gate_up_proj.{kind}", f"{feed_forward}.proj_in.{kind}"),
                same(f"{mine}.mlp.down_proj.{kind}", f"{feed_forward}.proj_out.{kind}"),
            ]
    last = config.num_layers + 1
    return [
        *pairs,
        same(f"layers.{last}.weight", "norm.gamma"),
        same(f"layers.{last + 1}.weight", "to_logits.weight"),
        same(f"layers.{last + 1}.bias", "to_logits.bias"),
    ]


def rotary_buffers(config: ModelConfig) -> dict[str, Tensor]:
    """Computes the frequencies that each of the library's layers keeps, [head_dim / 2] fp32."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    return {
        f"layers.{index}.0.rotary_emb.freqs": 1.0 / 10000.0**exponents
        for index in range(config.num_layers)
    }


def infer_config(
    shapes: Mapping[str, Tensor], origin: str, segment_length: int, memory_rule: str
) -> ModelConfig:
    """Infers the config from the tensors, except for the segment length and the memory rule.

    Raises:
        UserError: this is not a state_dict of the library's InfiniTransformer.
    """

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in shapes:
            raise UserError(
                f"{origin}: has no {name}; it must be the state_dict of an InfiniTransformer of "
                "infini-transformer-pytorch"
            )
        found = shapes[name].shape
        if len(found) != dimensions or not found.numel():
            raise UserError(
                f"{origin}: tensor {name} has shape {list(found)}, but must have {dimensions} "
                "dimensions, none of them 0"
            )
        return found

    vocab_size, hidden_size = shape("token_emb.weight", 2)
    (heads,) = shape("layers.0.0.fastweight_mem.head_gates", 1)
    channels, _ = shape("layers.0.0.to_qkv.weight", 2)
    if channels % (6 * heads):
        raise UserError(
            f"{origin}: tensor layers.0.0.to_qkv.weight has {channels} rows, but must have a "
            f"multiple of {6 * heads}: queries, keys and values of {heads} heads of an even width"
        )
    depth = {match[1] for name in shapes if (match := re.match(r"layers\.(\d+)\.", name))}
    try:
        return ModelConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=len(depth),
            num_heads=heads,
            head_dim=channels // (3 * heads),
            intermediate_size=shape("layers.0.1.proj_out.weight", 2)[1],
            segment_length=segment_length,
            memory_rule=memory_rule,  # type: ignore[arg-type]
            hidden_act="gelu",
            mlp_bias=True,
            head_bias=True,
            norm_eps=1e-30,
            gate_init=-10.0,
        )
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(error)}") from None


def check_config(config: ModelConfig, origin: str) -> None:
    """Checks that the library can build this model.

    Raises:
        UserError: it cannot; names the setting.
    """
    needed = {
        "hidden_act": "gelu", "mlp_bias": True, "head_bias": True, "attention_bias": False,
        "attention_out_bias": False, "qk_norm": False, "rope_theta": 10000.0, "rope_scaling": None,
        "use_sliding_window": False,
        "tie_embeddings": False,
    }  # fmt: skip
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise UserError(
                f"{origin}: model.{name} ({getattr(config, name)}) must be {value} for the seed "
                "library"
            )
    if not RULES[config.memory_rule].divides:
        raise UserError(
            f"{origin}: model.memory_rule ({config.memory_rule}) must be linear or delta for the "
            "seed library"
        )
    for name, off in (("write_gate", "false"), ("short_conv", "0")):
        if getattr(config.memory, name):
            raise UserError(
                f"{origin}: model.memory.{name} must be {off}; the seed library has nothing like it"
            )
    if config.kv_heads != config.num_heads:
        raise UserError(
            f"{origin}: model.num_kv_heads ({config.kv_heads}) must be num_heads "
            f"({config.num_heads}) for the seed library"
        )


def constructor(config: ModelConfig) -> str:
    """Formats the call with which the library builds the model for these weights."""
    width = ""
    if int(4 * config.hidden_size * 2 / 3) != config.mlp_size:
        # The library rounds ff_mult x dim x 2 / 3 down; the middle is safe from rounding errors.
        width = f"ff_mult={3 * (config.mlp_size + 0.5) / (2 * config.hidden_size)!r}, "
    return (
        f"InfiniTransformer(num_tokens={config.vocab_size}, dim={config.hidden_size}, "
        f"depth={config.num_layers}, dim_head={config.head_dim}, heads={config.num_heads}, "
        f"{width}use_mem_delta_rule={isinstance(RULES[config.memory_rule], Delta)})"
    )


def half_order(head_dim: int) -> Tensor:
    """Returns the place of each of our channels in their head: even channels first, then odd."""
    return torch.cat((torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)))


def _heads(ours: str, theirs: str, order: Tensor) -> Pair:
    """Pairs fused projections, with the channels of queries and keys in each head reordered."""
    back = order.argsort()

    def ordered(weight: Tensor, order: Tensor) -> Tensor:
        q, k, v = weight.chunk(3)
        return torch.cat((_permute_heads(q, order), _permute_heads(k, order), v))

    return Pair(ours, (theirs,), lambda t: ordered(t[0], order), lambda t: (ordered(t, back),))


def _negated(ours: str, theirs: str) -> Pair:
    return Pair(ours, (theirs,), lambda tensors: -tensors[0], lambda tensor: (-tensor,))


def _halves(ours: str, theirs: str) -> Pair:
    """Pairs weights whose two halves of rows are swapped."""

    def swapped(weight: Tensor) -> Tensor:
        first, second = weight.chunk(2)
        return torch.cat((second, first))

    return Pair(ours, (theirs,), lambda tensors: swapped(tensors[0]), lambda t: (swapped(t),))


def _permute_heads(weight: Tensor, order: Tensor) -> Tensor:
    return weight.unflatten(0, (-1, len(order)))[:, order.to(weight.device)].flatten(0, 1)
