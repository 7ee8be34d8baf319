"""Converts checkpoints of Hugging Face's Llama, Mistral, Qwen2 and Qwen3 (`...ForCausalLM`).

The families differ in their biases and defaults, and Qwen3 also normalises queries and keys. Their
rotary embedding pairs the two halves of a head, as ours does. Only the projections that we fuse
are separate there.
"""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from infini_ds.config import ModelConfig, RopeScaling
from infini_ds.conversion.pairs import Pair, fused, same
from infini_ds.conversion.plain_config import Linear, Llama3, PlainConfig, Rope, checked, explain
from infini_ds.errors import UserError
from infini_ds.system.causes import one_line

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_OF_ALL_GEMMAS = "norms that scale by 1 + weight, embeddings scaled by sqrt(hidden_size), GELU-tanh"
_OF_LATER_GEMMAS = f"{_OF_ALL_GEMMAS}, norms after attention and feed-forward, layers that slide"
_LACKED = {
    "gemma": _OF_ALL_GEMMAS,
    "gemma2": f"{_OF_LATER_GEMMAS}, soft caps on attention scores and logits",
    "gemma3": f"{_OF_LATER_GEMMAS} and have a rotary base of their own",
}
_LACKED["gemma3_text"] = _LACKED["gemma3"]
# Buffers that old checkpoints hold beside their parameters.
ROTARY = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
HEAD = "lm_head.weight"


def table(config: ModelConfig) -> list[Pair]:
    """Pairs their tensors with ours, layer by layer."""
    q, kv = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
    pairs = [same("layers.0.weight", "model.embed_tokens.weight")]
    for index in range(config.num_layers):
        mine, theirs = f"layers.{index + 1}", f"model.layers.{index}"
        norms = ["input_layernorm", "post_attention_layernorm"]
        if config.qk_norm:
            norms += ["self_attn.q_norm", "self_attn.k_norm"]
        pairs += [same(f"{mine}.{norm}.weight", f"{theirs}.{norm}.weight") for norm in norms]
        for kind in _kinds(config.attention_bias):
            names = [f"{theirs}.self_attn.{x}_proj.{kind}" for x in "qkv"]
            pairs.append(fused(f"{mine}.self_attn.qkv_proj.{kind}", names, (q, kv, kv)))
        for kind in _kinds(config.attention_out_bias):
            name = f"self_attn.o_proj.{kind}"
            pairs.append(same(f"{mine}.{name}", f"{theirs}.{name}"))
        for kind in _kinds(config.mlp_bias):
            names = [f"{theirs}.mlp.{x}_proj.{kind}" for x in ("gate", "up")]
            pairs.append(fused(f"{mine}.mlp.gate_up_proj.{kind}", names, (config.mlp_size,) * 2))
            name = f"mlp.down_proj.{kind}"
            pairs.append(same(f"{mine}.{name}", f"{theirs}.{name}"))
    last = config.num_layers + 1
    pairs.append(same(f"layers.{last}.weight", "model.norm.weight"))
    if not config.tie_embeddings:
        pairs.append(same(f"layers.{last + 1}.weight", HEAD))
    return pairs


def gates(config: ModelConfig) -> list[str]:
    """Lists our parameters of the memory, which a plain model lacks."""
    return [f"layers.{index + 1}.self_attn.beta" for index in range(config.num_layers)]


def read_config(path: Path) -> dict[str, Any]:
    """Reads a checkpoint's config.json.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name the directory of a Hugging Face "
            "checkpoint, or a model on its hub, ORGANISATION/MODEL"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({one_line(error)})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must be a mapping of settings")
    return tree


def from_config(
    tree: dict[str, Any], path: Path, segment_length: int, gate_init: float, memory_rule: str
) -> ModelConfig:
    """Converts a plain model's config to ours.

    Args:
        tree: content of its config.json.
        path: path of the config.json, for messages.

    Raises:
        UserError: the model has a feature that ours lacks; names the setting.
    """
    family = str(tree.get("model_type"))
    if family not in ARCHITECTURES:
        lacked = _LACKED.get(family, "what others have (experts, other norms, ...)")
        raise UserError(
            f"{path}: model_type ({family}) must be one of {', '.join(ARCHITECTURES)}; our layers "
            f"lack {lacked}"
        )
    architecture = ARCHITECTURES[family]
    if tree.get("architectures") not in (None, [architecture]):
        raise UserError(f"{path}: architectures ({tree['architectures']}) must be [{architecture}]")
    for name in ("quantization_config", "partial_rotary_factor"):
        if tree.get(name) is not None:
            raise UserError(f"{path}: {name} is not supported; it must be absent")
    plain = checked(PlainConfig, tree, f"{path}: ")
    slides = family == "mistral" or plain.use_sliding_window
    window = plain.sliding_window if slides else None
    if window is not None and segment_length > window:
        raise UserError(
            f"{path}: sliding_window ({window}) is below --segment-length ({segment_length}); "
            f"local attention sees whole segments, so make --segment-length at most {window}"
        )
    if family in ("llama", "qwen3"):
        bias = plain.attention_bias
        biases = (bias, bias, family == "llama" and plain.mlp_bias)
    else:
        biases = (family == "qwen2", False, False)
    theta, scaling = _rope(plain, path)
    heads = plain.num_attention_heads
    try:
        return ModelConfig(
            **{ours: getattr(plain, name) for ours, name in _REQUIRED.items()},
            num_kv_heads=plain.num_key_value_heads or heads,
            head_dim=plain.head_dim or (128 if family == "qwen3" else plain.hidden_size // heads),
            segment_length=segment_length,
            memory_rule=memory_rule,  # type: ignore[arg-type]
            hidden_act=plain.hidden_act,
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=plain.tie_word_embeddings,
            attention_bias=biases[0],
            attention_out_bias=biases[1],
            mlp_bias=biases[2],
            qk_norm=family == "qwen3",
            gate_init=gate_init,
            initializer_range=plain.initializer_range,
        )
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error)}") from None


def to_config(
    config: ModelConfig, origin: str, dtype: torch.dtype, source: dict[str, Any] | None
) -> dict[str, Any]:
    """Builds the config.json of the plain model that remains of ours without its memory.

    Args:
        config: config of our model.
        origin: origin of the model, for messages.
        dtype: dtype of the weights.
        source: config.json of the plain model that ours was made from, if any; it supplies what
            our config lacks, such as special tokens and the longest context.

    Raises:
        UserError: the remaining model belongs to none of these families; names the setting.
    """
    if config.memory.short_conv:
        raise UserError(
            f"{origin}: model.memory.short_conv must be 0; the convolution is a part of local "
            "attention that plain models lack"
        )
    if config.use_sliding_window:
        raise UserError(
            f"{origin}: model.use_sliding_window must be false; without their memory, such models "
            "read no further than a segment"
        )
    if config.head_bias:
        raise UserError(f"{origin}: model.head_bias must be false; plain models have none")
    if config.hidden_size % config.num_heads and not config.qk_norm:
        raise UserError(
            f"{origin}: model.hidden_size ({config.hidden_size}) must be a multiple of num_heads "
            f"({config.num_heads}) for {ARCHITECTURES['llama']}"
        )
    family = _family(config, origin)
    if source and source.get("model_type") == "mistral" and family == "llama":
        family = "mistral"
    rope = config.rope_scaling and config.rope_scaling.model_dump()
    if rope and rope["rope_type"] == "linear":
        rope = {name: rope[name] for name in ("rope_type", "factor")}
    tree = {
        "bos_token_id": None,
        "eos_token_id": None,
        "max_position_embeddings": config.segment_length,
        **(source or {}),
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        **{name: getattr(config, ours) for ours, name in _REQUIRED.items()},
        "intermediate_size": config.mlp_size,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": config.hidden_act,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if family == "qwen3" or config.head_dim * config.num_heads != config.hidden_size:
        tree["head_dim"] = config.head_dim  # transformers infers it otherwise
    if family == "llama":
        tree |= {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    elif family == "qwen3":
        tree["attention_bias"] = config.attention_bias
        tree.setdefault("use_sliding_window", False)
    elif family == "mistral":
        tree.setdefault("sliding_window", 4096)
    else:
        tree.setdefault("use_sliding_window", False)
    for name in ("rope_parameters", "dtype"):  # other names for what is set above
        tree.pop(name, None)
    return tree


# Our names of the settings that have no default, with their names.
_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "norm_eps": "rms_norm_eps",
}


def _kinds(bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)


def _rope(plain: PlainConfig, path: Path) -> tuple[float, RopeScaling | None]:
    """Returns base and scaling of the rotary frequencies, from old or new setting names."""
    section = "rope_parameters" if plain.rope_parameters else "rope_scaling"
    settings = {"rope_theta": plain.rope_theta, **(getattr(plain, section) or {})}
    name = settings.pop("type", "default")
    name = settings.pop("rope_type", name)
    if name not in ("default", "linear", "llama3"):
        raise UserError(f"{path}: {section}.rope_type ({name}) must be default, linear or llama3")
    kind = {"default": Rope, "linear": Linear, "llama3": Llama3}[name]
    if unknown := settings.keys() - kind.model_fields:
        raise UserError(f"{path}: {section}.{min(unknown)} is not supported with rope_type {name}")
    scaling = checked(kind, settings, f"{path}: {section}.").model_dump()
    theta = scaling.pop("rope_theta")
    if name == "default":
        return theta, None
    try:
        return theta, RopeScaling(rope_type=name, **scaling)
    except ValidationError as error:
        raise UserError(f"{path}: {section}.{explain(error)}") from None


def _family(config: ModelConfig, origin: str) -> str:
    """Picks the family that has these biases and norms."""
    biases = (config.attention_bias, config.attention_out_bias)
    if config.qk_norm:
        if biases[0] == biases[1] and not config.mlp_bias:
            return "qwen3"
    elif biases[0] == biases[1]:
        return "llama"
    elif biases == (True, False) and not config.mlp_bias:
        return "qwen2"
    raise UserError(
        f"{origin}: model.attention_bias ({biases[0]}), attention_out_bias ({biases[1]}), mlp_bias "
        f"({config.mlp_bias}) and qk_norm ({config.qk_norm}) are together in none of "
        f"{', '.join(ARCHITECTURES.values())}"
    )
