"""Reads exported models, and opens an export or a run for conversion.

    EXPORT/
        model.safetensors       parameters by their names in InfiniTransformer; or shards and
                                model.safetensors.index.json, as Hugging Face names them
        config.yaml             the ModelConfig, under `model`; the kind of its tokenizer, under
                                `tokenizer`, if it is one of data.tokenizer's
        source_config.json      the config.json of the plain model it was made from, if any
        tokenizer.model ...     its tokenizer's files

An export may also be a single file, whose metadata has the text of config.yaml under `config`.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from infini_ds.config import ExportConfig, ModelConfig, RunConfig, parse_export
from infini_ds.data.generation_settings import GENERATION
from infini_ds.data.tokenizer import load_tokenizer
from infini_ds.data.tokenizer_base import Tokenizer
from infini_ds.errors import UserError
from infini_ds.model.layers import layer_shapes
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.runs.checkpoint import (
    Loaded,
    config_of,
    find_checkpoint,
    is_checkpoint,
    is_run,
    load_run,
)
from infini_ds.runs.weights import INDEX, SINGLE, CheckpointWeights, SafetensorsWeights
from infini_ds.system.console import Console
from infini_ds.system.ranges import compute_dtype, name_of
from infini_ds.system.resources import keep_freed_memory
from infini_ds.system.temporary import temporary_beside

CONFIG = "config.yaml"
SOURCE_CONFIG = "source_config.json"
METADATA_KEY = "config"
_TOKENIZER_PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template*",
)  # fmt: skip


class Model(NamedTuple):
    """A model on disk."""

    settings: RunConfig | ExportConfig
    """The run's settings, as the checkpoint has them, or the export's."""
    weights: SafetensorsWeights | CheckpointWeights
    """The weights by their names in InfiniTransformer."""
    checkpoint: Path | None
    """The checkpoint it comes from, if it is a run's."""
    notes: list[str]
    """Remarks for the user on where the model was found."""

    @property
    def config(self) -> ModelConfig:
        """The model's settings."""
        return self.settings.model

    @property
    def tokenizer_kind(self) -> str | None:
        """The kind, as in data.tokenizer.kind; None for an export without a readable tokenizer."""
        if isinstance(self.settings, RunConfig):
            return self.settings.data.tokenizer.kind
        return self.settings.tokenizer


def load_model(path: str | Path, step: int | None = None) -> Loaded:
    """Loads the model of an export or of a run, with its tokenizer.

    Args:
        path: directory or file of an export, output_dir of a run, or one of its checkpoints.
        step: step of the checkpoint, if `path` is a run.

    Raises:
        UserError: `path` is none of these, the weights are damaged, or the tokenizer is gone.
    """
    path = Path(path)
    if _is_of_run(path) or not is_export(path):
        return load_run(path, step)
    _check_no_step(path, step)
    config, _ = _open_export(path)
    tokenizer = export_tokenizer(config)
    if tokenizer is None and path.is_file():
        raise UserError(
            f"{path}: a single file carries no tokenizer; name the run or the directory that it "
            "was made from, or make a directory with `infini-ds convert from-safetensors` and put "
            "the tokenizer there"
        )
    if tokenizer is None:
        raise UserError(
            f"{path}: has no tokenizer that can be read; put its tokenizer.json there and "
            f"`tokenizer: tokenizers` into {CONFIG}, or a sentencepiece model as tokenizer.model "
            "and `tokenizer: sentencepiece`"
        )
    model, _ = load_export(path)
    return Loaded(model, config, tokenizer, path, 0, path if path.is_dir() else path.parent, [])


def load_for_command(path: str | Path, step: int | None, console: Console) -> Loaded:
    """Loads the model that a command reads long texts with, and says which checkpoints it skipped.

    Args:
        path, step: see `load_model`, which raises the same errors.
    """
    keep_freed_memory()
    loaded = load_model(path, step)
    for line in loaded.skipped:
        console.print(line, style="yellow")
    return loaded


def load_export(path: str | Path) -> tuple[InfiniTransformer, ModelConfig]:
    """Loads an export for evaluation, on the CPU and in the dtype of its file (fp16 becomes fp32).

    Args:
        path: directory or file of the export.

    Raises:
        UserError: `path` is no export, or its weights do not fit its config or one another.
    """
    config, weights = _open_export(Path(path))
    check_tensors(weights.metas, parameters_of(config.model), weights.origin, CONFIG)
    dtypes = {name: compute_dtype(meta.dtype) for name, meta in weights.metas.items()}
    computed = {name: meta.to(dtypes[name]) for name, meta in weights.metas.items()}
    check_one_dtype(computed, weights.origin)
    with torch.device("meta"):
        module = InfiniTransformer(config.model)
    state = {name: weights.read(name).to(dtype) for name, dtype in dtypes.items()}
    module.load_state_dict(state, assign=True)
    return module.eval(), config.model


def write_export(model: InfiniTransformer, directory: Path) -> None:
    """Writes a trained model as an export without a tokenizer, in the dtype of its weights.

    Args:
        directory: where; it must not exist.

    Raises:
        UserError: it exists, or cannot be written.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(directory) as unfinished:
            export = unfinished / directory.name
            export.mkdir()
            save_file(model.state_dict(), export / SINGLE, {"format": "pt"})
            (export / CONFIG).write_text(config_text(model.config, None), encoding="utf-8")
            export.rename(directory)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror})") from None


def open_model(path: Path, step: int | None = None) -> Model:
    """Opens an export, or the newest valid checkpoint of a run.

    Args:
        path: directory or file of an export, output_dir of a run, or one of its checkpoints.
        step: step of the checkpoint, if `path` is a run.

    Raises:
        UserError: `path` is none of these, or the weights do not fit the config.
    """
    if _is_of_run(path):
        checkpoint, skipped = find_checkpoint(path, step)
        settings = config_of(checkpoint)
        model = Model(settings, CheckpointWeights(checkpoint), checkpoint, skipped)
    else:
        _check_no_step(path, step)
        model = Model(*_open_export(path), None, [])
    check_tensors(model.weights.metas, parameters_of(model.config), model.weights.origin, CONFIG)
    return model


def is_export(path: Path) -> bool:
    """Tells whether the path is a file, or a directory of safetensors."""
    return path.is_file() or any((path / name).is_file() for name in (SINGLE, INDEX))


def parameters_of(config: ModelConfig) -> dict[str, Tensor]:
    """Returns all parameters of a model, in order, as meta tensors."""
    return {name: meta for layer in layer_shapes(config) for name, meta in layer.items()}


def check_tensors(
    found: dict[str, Tensor], expected: dict[str, Tensor], origin: str, config: str
) -> None:
    """Checks that exactly the expected tensors are there, with the expected shapes.

    Args:
        config: name of what expects them, for messages.

    Raises:
        UserError: a tensor is missing, superfluous or of another shape; names the first.
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
                f"{origin}: tensor {name} is {name_of(found[name].dtype)}; "
                "weights must be float32, bfloat16 or float16"
            )
    for name in found:
        if name not in expected:
            raise UserError(f"{origin}: tensor {name} has no counterpart in the model of {config}")


def check_one_dtype(found: dict[str, Tensor], origin: str) -> None:
    """Checks that all tensors have one dtype, as a model needs to compute.

    Raises:
        UserError: two tensors differ; names them.
    """
    first = next(iter(found))
    for name, meta in found.items():
        if meta.dtype != found[first].dtype:
            kinds = (name_of(found[each].dtype) for each in (first, name))
            raise UserError(
                f"{origin}: {first} is {next(kinds)}, {name} {next(kinds)}; make them one with "
                "`infini-ds convert to-safetensors --dtype fp32` or `bf16`"
            )


def config_text(config: ModelConfig, tokenizer: str | None) -> str:
    """Formats the config.yaml of an export.

    Args:
        tokenizer: kind of the tokenizer; None if it is none of data.tokenizer's.
    """
    tree: dict = {"model": config.model_dump()}
    if tokenizer:
        tree["tokenizer"] = tokenizer
    return yaml.safe_dump(tree, sort_keys=False)


def export_tokenizer(config: ExportConfig) -> Tokenizer | None:
    """Loads the tokenizer of an export, if it has one that we can read.

    Raises:
        UserError: its file is missing or unusable, or it has ids that the model lacks.
    """
    if config.tokenizer is None:
        return None
    tokenizer = load_tokenizer(config.tokenizer, config.tokenizer_file)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{config.tokenizer_file or config.directory}: the tokenizer has "
            f"{tokenizer.vocab_size} ids, but the model {config.model.vocab_size}; it must be the "
            "model's own"
        )
    return tokenizer


def tokenizer_files(source: Path) -> list[Path]:
    """Lists the tokenizer files in a directory, whether of our kinds or of others."""
    found = (file for pattern in _TOKENIZER_PATTERNS for file in source.glob(pattern))
    return [file for file in found if file.is_file()]


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copies a tokenizer's files and the settings for generation unchanged, if there are any."""
    files = tokenizer_files(source)
    if (source / GENERATION).is_file():
        files.append(source / GENERATION)
    for file in files:
        shutil.copyfile(file, directory / file.name)


def _is_of_run(path: Path) -> bool:
    """Tells whether the path belongs to a run, which takes precedence over weights lying in it."""
    try:
        return is_run(path) or is_checkpoint(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _open_export(path: Path) -> tuple[ExportConfig, SafetensorsWeights]:
    if not path.exists():
        raise UserError(f"{path}: no such file or directory; name an export or a run's output_dir")
    if not is_export(path):
        raise UserError(f"{path}: is neither an export (no {SINGLE}) nor a run (no checkpoints)")
    weights = SafetensorsWeights(path)
    beside = (path if path.is_dir() else path.parent) / CONFIG
    if METADATA_KEY in weights.metadata and path.is_file():
        text, origin = weights.metadata[METADATA_KEY], f"{path}, its metadata"
    elif beside.is_file():
        text, origin = _read(beside), str(beside)
    else:
        raise UserError(f"{path}: has no config; put a {CONFIG} with the key `model` beside it")
    return parse_export(text, origin, beside.parent), weights


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None


def _check_no_step(path: Path, step: int | None) -> None:
    if step is not None:
        raise UserError(f"--step ({step}): {path} is not a run with checkpoints")
