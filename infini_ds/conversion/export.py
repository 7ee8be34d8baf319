"""A model outside of any run, and how either is opened to be converted.

    EXPORT/
        model.safetensors       parameters by their names in InfiniTransformer; or shards and
                                model.safetensors.index.json, as Hugging Face names them
        config.yaml             the ModelConfig, under `model`
        source_config.json      if it began as a plain model: its config.json
        tokenizer.json ...      its tokenizer's files, unchanged

A single file is an export too: its metadata has the text of config.yaml under `config`.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import Tensor

from infini_ds import config as configuration
from infini_ds.config import ModelConfig
from infini_ds.conversion.run import find_checkpoint
from infini_ds.conversion.weights import INDEX, SINGLE, CheckpointWeights, SafetensorsWeights
from infini_ds.errors import UserError
from infini_ds.model.transformer import InfiniTransformer

CONFIG = "config.yaml"
SOURCE_CONFIG = "source_config.json"
METADATA_KEY = "config"
_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template*",
)  # fmt: skip


class Model(NamedTuple):
    """A model on disk."""

    config: ModelConfig
    weights: SafetensorsWeights | CheckpointWeights
    """By the names of InfiniTransformer."""
    checkpoint: Path | None
    """The checkpoint it is from, if it is a run's."""
    notes: list[str]
    """What the user should know of where it was found."""


def load_export(path: str | Path) -> tuple[InfiniTransformer, ModelConfig]:
    """The model of an export, on the CPU, in the dtype of its file, to evaluate.

    Args:
        path: directory or file of the export.

    Raises:
        UserError: it is none, or its weights do not fit its config.
    """
    model = _open_export(Path(path))
    weights = model.weights
    check_tensors(weights.metas, parameters_of(model.config), weights.origin, CONFIG)
    with torch.device("meta"):
        module = InfiniTransformer(model.config)
    module.load_state_dict({name: weights.read(name) for name in weights.metas}, assign=True)
    return module.eval(), model.config


def open_model(path: Path, step: int | None = None) -> Model:
    """An export, or the newest valid checkpoint of a run.

    Args:
        path: directory or file of an export, output_dir of a run, or one of its checkpoints.
        step: of the checkpoint, where `path` is a run.

    Raises:
        UserError: it is none of them, or the weights do not fit the config.
    """
    is_run = path.name.startswith("step_") or (path / "checkpoints").is_dir()
    if is_run:
        checkpoint, skipped = find_checkpoint(path, step)
        config = configuration.load(checkpoint / CONFIG).model
        model = Model(config, CheckpointWeights(checkpoint), checkpoint, skipped)
    else:
        if step is not None:
            raise UserError(f"--step ({step}): {path} is not a run with checkpoints")
        model = _open_export(path)
    check_tensors(model.weights.metas, parameters_of(model.config), model.weights.origin, CONFIG)
    return model


def parameters_of(config: ModelConfig) -> dict[str, Tensor]:
    """Shapes of all parameters, in order, as meta tensors."""
    with torch.device("meta"):
        return dict(InfiniTransformer(config).named_parameters())


def check_tensors(
    found: dict[str, Tensor], expected: dict[str, Tensor], origin: str, config: str
) -> None:
    """Whether exactly these tensors are there, of these shapes.

    Args:
        config: what asks for them, for messages.

    Raises:
        UserError: names the first that is not.
    """
    for name, meta in expected.items():
        if name not in found:
            raise UserError(f"{origin}: has no tensor {name}, which {config} asks for")
        if found[name].shape != meta.shape:
            raise UserError(
                f"{origin}: tensor {name} has shape {list(found[name].shape)}, but {config} asks "
                f"for {list(meta.shape)}"
            )
        if not found[name].is_floating_point() or found[name].itemsize < 2:
            raise UserError(
                f"{origin}: tensor {name} is {str(found[name].dtype).removeprefix('torch.')}; "
                "weights must be float32, bfloat16 or float16"
            )
    for name in found:
        if name not in expected:
            raise UserError(f"{origin}: tensor {name} has no counterpart in the model of {config}")


def config_text(config: ModelConfig) -> str:
    """What config.yaml of an export holds."""
    return yaml.safe_dump({"model": config.model_dump()}, sort_keys=False)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copies the files of a tokenizer, unchanged, if there are any."""
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)


def _open_export(path: Path) -> Model:
    if not path.exists():
        raise UserError(f"{path}: no such file or directory; name an export or a run's output_dir")
    if path.is_dir() and not any((path / name).is_file() for name in (SINGLE, INDEX)):
        raise UserError(f"{path}: is neither an export (no {SINGLE}) nor a run (no checkpoints)")
    weights = SafetensorsWeights(path)
    beside = (path if path.is_dir() else path.parent) / CONFIG
    if METADATA_KEY in weights.metadata and path.is_file():
        text, origin = weights.metadata[METADATA_KEY], f"{path}, its metadata"
    elif beside.is_file():
        text, origin = beside.read_text(), str(beside)
    else:
        raise UserError(f"{path}: has no config; put a {CONFIG} with the key `model` beside it")
    return Model(_parse(text, origin), weights, None, [])


def _parse(text: str, origin: str) -> ModelConfig:
    try:
        tree = yaml.safe_load(text)
        model = tree["model"]
    except (yaml.YAMLError, KeyError, TypeError):
        raise UserError(f"config {origin}: must be YAML with the key `model`") from None
    # A run's config is what is checked with clear errors; its other sections are of no interest.
    rest = {"output_dir": "-", "data": {"store": "-"}, "train": {"steps": 1, "batch_size": 1}}
    config = configuration.parse({**rest, "model": model}, origin).model
    if config.vocab_size < 1:
        raise UserError(f"config {origin}: model.vocab_size must be given")
    return config
