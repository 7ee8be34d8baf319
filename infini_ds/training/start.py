"""Starts a run with the weights of an export."""

from pathlib import Path
from typing import Any

import torch

from infini_ds.config import ExportConfig, ModelConfig, RunConfig
from infini_ds.data.mixture import Mixture
from infini_ds.errors import UserError
from infini_ds.parallel.engine import Engine
from infini_ds.runs.export import export_tokenizer, open_model
from infini_ds.runs.weights import Weights
from infini_ds.system.ranges import check_finite, narrowed

_FREE = (
    "gate_init", "initializer_range", "embedding_initializer_range", "memory.write_penalty",
)  # fmt: skip
"""Settings that do not affect weights that already exist."""


def open_start(config: RunConfig, data: Mixture) -> Weights:
    """Opens the export of config.init_from; it must have the run's model settings and tokenizer.

    Args:
        config: the run's config with model.vocab_size set.

    Raises:
        UserError: the export is incomplete, or a setting differs; the message names the setting.
    """
    origin = f"init_from ({config.init_from})"
    export = open_model(Path(config.init_from))
    if not isinstance(export.settings, ExportConfig):
        raise UserError(
            f"{origin}: is a run; make an export of it with `infini-ds convert to-safetensors`"
        )
    theirs, ours = _settings(export.config), _settings(config.model)
    for name, value in theirs.items():
        if name not in _FREE and value != ours[name]:
            raise UserError(
                f"model.{name} ({ours[name]}) must be {value}, as in {origin}; leave it out of "
                "the run's config to take it from there"
            )
    tokenizer, used = export_tokenizer(export.settings), data.tokenizer
    if tokenizer is None and used.vocab_size != config.model.vocab_size:
        raise UserError(
            f"data.tokenizer: the tokenizer of {data.place} has {used.vocab_size} tokens, but "
            f"{origin} has {config.model.vocab_size}, and no tokenizer to compare"
        )
    if tokenizer is not None and tokenizer.fingerprint != used.fingerprint:
        raise UserError(
            f"data.tokenizer: the tokenizer of {data.place} is not the one of {origin}; leave it "
            "out of the run's config to take it from there, and prepare another data.store"
        )
    return export.weights


@torch.no_grad()
def load_start(engine: Engine, weights: Weights) -> None:
    """Fills this rank's parameters, and the fp32 copies that the optimizer keeps of them.

    Only one tensor is in memory at a time, and only tensors that this rank has are read.

    Args:
        weights: the result of `open_start`.

    Raises:
        UserError: a weight is not finite, or beyond the range of its parameter's type.
    """
    for name, parameter in engine.own_parameters():
        what = f"init_from: tensor {name} of {weights.origin}"
        tensor = weights.read(name)
        check_finite(tensor, what)
        narrowed(tensor, parameter.dtype, what)
        engine.set_weight(parameter, narrowed(tensor, torch.float32, what))


def _settings(config: ModelConfig) -> dict[str, Any]:
    """Returns all settings of a model by their dotted names, with defaults resolved."""
    settings = config.model_dump()
    memory = settings.pop("memory")
    settings |= {"num_kv_heads": config.kv_heads, "intermediate_size": config.mlp_size}
    return settings | {f"memory.{name}": value for name, value in memory.items()}
