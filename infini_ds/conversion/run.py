"""The model of a run, out of its checkpoints, on one device and without DeepSpeed.

What takes a run or an export alike is `conversion.export.load_model`.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from infini_ds import config as configuration
from infini_ds.config import RunConfig
from infini_ds.data.mixture import Mixture
from infini_ds.data.store import sha256_of
from infini_ds.data.tokenizer import Tokenizer, load_tokenizer
from infini_ds.errors import UserError
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.training import manifest

_LAYER_FILE = re.compile(r"layer_(\d+)-model_states\.pt")


class Loaded(NamedTuple):
    """A model with what its commands need."""

    model: InfiniTransformer
    """On the CPU, to evaluate; in the dtype that its weights are stored in."""
    config: RunConfig
    """As the checkpoint has it; of an export, that model with the defaults of all else."""
    tokenizer: Tokenizer
    """Of the run's data.store, or of the export."""
    checkpoint: Path
    """Where the weights are from, OUTPUT_DIR/checkpoints/step_XXXXXXXX or the export."""
    step: int
    """Training steps that made the weights, 0 of an export."""
    directory: Path
    """Where reports go: the run's output directory, or that of the export."""
    skipped: list[str]
    """Newer checkpoints that were passed over, a line each with the reason."""


def load_run(path: str | Path, step: int | None = None) -> Loaded:
    """Loads the newest valid checkpoint of a run, or a given one.

    Args:
        path: output_dir of a run, or one directory of its checkpoints.
        step: that of the checkpoint to take, where `path` is a run.

    Raises:
        UserError: there is no such run or no valid checkpoint, or the run's tokenizer is gone.
    """
    checkpoint, skipped = find_checkpoint(Path(path), step)
    config = configuration.load(checkpoint / "config.yaml")
    tokenizer = tokenizer_of(checkpoint, config)
    weights = read_weights(checkpoint)
    with torch.device("meta"):
        model = InfiniTransformer(config.model)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(
            f"checkpoint {checkpoint}: its weights do not fit this version's model "
            f"({' '.join(str(error).split())})"
        ) from None
    directory = checkpoint.parent.parent
    step = manifest.step_of(checkpoint)
    return Loaded(model.eval(), config, tokenizer, checkpoint, step, directory, skipped)


def is_checkpoint(path: Path) -> bool:
    """Whether it is a directory named as checkpoints are, and no run of such a name."""
    named = re.fullmatch(r"step_[0-9]+", path.resolve().name)
    return named is not None and path.is_dir() and not is_run(path)


def is_run(path: Path) -> bool:
    """Whether it is a directory with checkpoints, whole or not."""
    return bool(manifest.directories(path / "checkpoints"))


def find_checkpoint(path: Path, step: int | None) -> tuple[Path, list[str]]:
    """The checkpoint to take, and what was passed over, a line each; see `load_run`."""
    if not path.is_dir():
        raise UserError(f"run {path}: no such directory; name the output_dir of a run")
    if is_checkpoint(path):
        candidates = [path.resolve()]
        if step not in (None, manifest.step_of(candidates[0])):
            raise UserError(f"run {path}: is a checkpoint; name its run to choose step {step}")
    else:
        candidates = manifest.directories(path.resolve() / "checkpoints")
        if step is not None:
            steps = [manifest.step_of(directory) for directory in candidates]
            if step not in steps:
                there = ", ".join(map(str, sorted(steps))) or "none"
                raise UserError(f"run {path}: has no checkpoint of step {step}; there are: {there}")
            candidates = [candidates[steps.index(step)]]
    skipped = []
    for directory in candidates:
        problem = _problem(directory)
        if problem is None:
            return directory, skipped
        skipped.append(f"checkpoint {directory}: passed over, {problem}")
    if len(candidates) == 1:
        raise UserError(f"checkpoint {candidates[0]}: cannot be used, {problem}")
    what = f"none of its {len(candidates)} checkpoints is valid" if candidates else "no checkpoint"
    raise UserError(f"run {path}: {what}; train it first with `infini-ds pretrain CONFIG`")


def _problem(directory: Path) -> str | None:
    """Why a checkpoint cannot be used, if it cannot. Only what is read here is checksummed."""
    try:
        files = manifest.read(directory)
    except ValueError as error:
        return str(error)
    try:
        for file in (*layer_files(directory), directory / "config.yaml", directory / "state.json"):
            if file.name not in files or sha256_of(file) != files[file.name]["sha256"]:
                return f"{file.name} does not have its checksum"
    except OSError as error:  # or the run that it belongs to has just deleted it
        return f"it cannot be read ({error.strerror})"
    return None


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Every parameter by its name in InfiniTransformer, mapped from its file."""
    weights = {}
    for file in layer_files(checkpoint):
        index = int(file.name.split("-")[0].removeprefix("layer_"))
        layer = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        # The second place of a tied weight has no file of its own.
        weights |= {f"layers.{index}.{name}": weight for name, weight in layer.items()}
    return weights


def layer_files(checkpoint: Path) -> list[Path]:
    """DeepSpeed's files of the weights, one a layer, whatever the number of stages."""
    return sorted(file for file in checkpoint.iterdir() if _LAYER_FILE.fullmatch(file.name))


def tokenizer_of(checkpoint: Path, config: RunConfig) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with.

    Raises:
        UserError: the store that has it is gone, or is another one.
    """
    if config.data.tokenizer.kind == "bytes":
        return load_tokenizer("bytes")
    data = Mixture.open(config.data, settings=False)
    if data.fingerprint != json.loads((checkpoint / "state.json").read_text())["store"]:
        raise UserError(
            f"{data.place}: is not what checkpoint {checkpoint} was trained on, "
            "so its tokenizer may be another; put what the run had there"
        )
    return data.tokenizer
