"""Adds what transformers needs to load an export: config, code, tokenizer and model card."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from infini_ds.config import ModelConfig
from infini_ds.conversion.llama import read_config
from infini_ds.conversion.model_card import model_card
from infini_ds.data.generation_settings import GENERATION, read_generation
from infini_ds.data.tokenizer_base import Tokenizer
from infini_ds.data.tokenizer_json import TokenizerJson
from infini_ds.runs.export import SOURCE_CONFIG, Model

CODE = Path(__file__).with_name("hf")
_TOKENIZER_CODE = "tokenization_infini.py"
_TOKENIZER_CLASS = "InfiniTokenizer"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_MODEL_CODE = ("configuration_infini.py", "layers_infini.py", "modeling_infini.py")


def write_huggingface(
    directory: Path, name: str, model: Model, tokenizer: Tokenizer | None, dtype: torch.dtype
) -> None:
    """Adds to an export what AutoModelForCausalLM and AutoTokenizer ask for.

    Args:
        directory: the export, with its weights and its tokenizer's files.
        name: name of the model, for its card.
        tokenizer: None if it is of no kind that we read; then its files, if any, stay as they
            are. So do files that transformers reads without our code.
        dtype: dtype of the weights.
    """
    generation = tokenizer.generation if tokenizer else read_generation(directory)
    special = _special_tokens(directory, tokenizer, generation)
    _write(directory / "config.json", config_tree(model.config, dtype) | special)
    if tokenizer is not None:
        add_tokenizer_code(directory, tokenizer)
    pad = generation.get("pad_token_id")
    if pad is None:
        ends = special["eos_token_id"]
        pad = next(iter(ends), None) if isinstance(ends, list) else ends
    _write(directory / GENERATION, {**generation, **special, "pad_token_id": pad})
    for file in _MODEL_CODE:
        shutil.copyfile(CODE / file, directory / file)
    (directory / "README.md").write_text(model_card(name, model, tokenizer, dtype))


def add_tokenizer_code(directory: Path, tokenizer: Tokenizer) -> None:
    """Adds what AutoTokenizer asks for to the files that the tokenizer has saved there."""
    if not _has_foreign_tokenizer(directory):
        auto = [f"{Path(_TOKENIZER_CODE).stem}.{_TOKENIZER_CLASS}", None]
        tree = {"tokenizer_class": _TOKENIZER_CLASS, "auto_map": {"AutoTokenizer": auto}}
        _write(directory / _TOKENIZER_CONFIG, tree)
        shutil.copyfile(CODE / _TOKENIZER_CODE, directory / _TOKENIZER_CODE)
    elif isinstance(tokenizer, TokenizerJson):
        _take_as_it_is(tokenizer, directory)


def config_tree(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Builds the config.json of InfiniForCausalLM."""
    return {
        "architectures": ["InfiniForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_infini.InfiniConfig",
            "AutoModelForCausalLM": "modeling_infini.InfiniForCausalLM",
        },
        "model_type": "infini_transformer",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "segment_length": config.segment_length,
        "use_sliding_window": config.use_sliding_window,
        "memory_rule": config.memory_rule,
        "memory_layers": None if config.memory.layers is None else list(config.memory.layers),
        "write_gate": config.memory.write_gate,
        "write_gate_sees_keys": config.memory.write_gate_sees_keys,
        "short_conv": config.memory.short_conv,
        "hidden_act": config.hidden_act,
        "rotary_base": config.rope_theta,
        "rotary_scaling": config.rope_scaling and config.rope_scaling.model_dump(),
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.attention_bias,
        "attention_out_bias": config.attention_out_bias,
        "qk_norm": config.qk_norm,
        "mlp_bias": config.mlp_bias,
        "head_bias": config.head_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
    }


def _has_foreign_tokenizer(directory: Path) -> bool:
    """Tells whether there are tokenizer files that transformers reads without our code."""
    config = directory / _TOKENIZER_CONFIG
    ours = config.is_file() and _TOKENIZER_CLASS in config.read_text(
        encoding="utf-8", errors="replace"
    )
    return not ours and any(directory.glob("tokenizer*.json"))


def _take_as_it_is(tokenizer: TokenizerJson, directory: Path) -> None:
    """Makes transformers use the tokenizer.json as it is, which some tokenizer classes do not."""
    tokenizer.save(directory)
    path = directory / _TOKENIZER_CONFIG
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree.pop("auto_map", None)
    # The default includes token_type_ids, which the model does not take.
    tree.setdefault("model_input_names", ["input_ids", "attention_mask"])
    _write(path, tree | {"tokenizer_class": "PreTrainedTokenizerFast"})


def special_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the ids of BOS and EOS for config.json: a list if several tokens end a text."""
    ends = tokenizer.eos_ids
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if ends[1:] else ends[0]}


def _special_tokens(
    directory: Path, tokenizer: Tokenizer | None, generation: dict[str, Any]
) -> dict[str, Any]:
    if tokenizer is not None:
        return special_tokens(tokenizer)
    before = directory / SOURCE_CONFIG
    tree = read_config(before) if before.is_file() else {}
    return {
        name: tree.get(name) if generation.get(name) is None else generation[name]
        for name in ("bos_token_id", "eos_token_id")
    }


def _write(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")
