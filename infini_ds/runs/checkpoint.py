"""Loads the model of a run from its checkpoints, on one device and without DeepSpeed.

To load a model from a run or an export alike, use `runs.export.load_model`.
"""

import glob
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infini_ds import config as configuration
from infini_ds.config import CorpusConfig, ExportConfig, RunConfig
from infini_ds.data.mixture import Mixture
from infini_ds.data.tokenizer import load_tokenizer
from infini_ds.data.tokenizer_base import Tokenizer
from infini_ds.errors import UserError
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.runs import manifest
from infini_ds.runs.directory import Checkpoint, Depth, RunDirectory
from infini_ds.runs.tokenizer import FOLDER, kept_tokenizer
from infini_ds.system.causes import one_line

_LAYER_FILE = re.compile(r"layer_(\d+)-model_states\.pt")


class Loaded(NamedTuple):
    """A model with everything that commands need to use it."""

    model: InfiniTransformer
    """On the CPU, in evaluation mode, in the dtype of its stored weights; fp16 becomes fp32."""
    config: RunConfig | ExportConfig
    """The run's config, as `config_of` returns it, or the export's."""
    tokenizer: Tokenizer
    """The tokenizer of the checkpoint or of the export."""
    checkpoint: Path
    """Origin of the weights: OUTPUT_DIR/checkpoints/step_XXXXXXXX, or the export."""
    step: int
    """Number of training steps behind the weights; 0 for an export."""
    directory: Path
    """Place for reports: the run's output directory, or that of a lone checkpoint or export."""
    skipped: list[str]
    """Newer checkpoints that were passed over, one line each with the reason."""

    @property
    def run(self) -> RunConfig | None:
        """The config of the run that the model comes from; None for an export."""
        return self.config if isinstance(self.config, RunConfig) else None


def load_run(path: str | Path, step: int | None = None) -> Loaded:
    """Loads the newest valid checkpoint of a run, or a given one.

    Args:
        path: output_dir of a run, or the directory of one of its checkpoints.
        step: step of the checkpoint to load, if `path` is a run.

    Raises:
        UserError: there is no such run or no valid checkpoint, or the run's tokenizer is gone.
    """
    checkpoint, skipped = find_checkpoint(Path(path), step)
    config = config_of(checkpoint)
    tokenizer = tokenizer_of(checkpoint, config)
    weights = read_weights(checkpoint)
    with torch.device("meta"):
        model = InfiniTransformer(config.model)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(
            f"checkpoint {checkpoint}: its weights do not fit this version's model "
            f"({one_line(error)})"
        ) from None
    directory = run_of(checkpoint) or checkpoint
    steps = state_of(checkpoint).get("step", 0)
    return Loaded(model.eval(), config, tokenizer, checkpoint, steps, directory, skipped)


def is_checkpoint(path: Path) -> bool:
    """Tells whether a path is a checkpoint and not a run: a directory that is named like one, or a
    complete one under another name."""
    named = re.fullmatch(r"step_[0-9]+", path.resolve().name) is not None
    if not named:
        named = all((path / name).is_file() for name in (manifest.NAME, "state.json"))
    return named and path.is_dir() and not is_run(path)


def is_run(path: Path) -> bool:
    """Tells whether the path is a directory with checkpoints, complete or not."""
    return bool(RunDirectory(path).checkpoints())


def run_of(checkpoint: Path) -> Path | None:
    """Returns the directory of the run that a checkpoint lies in, or None if it lies elsewhere."""
    run = RunDirectory(checkpoint.parent.parent)
    return run.path if Checkpoint(checkpoint) in run.checkpoints() else None


def config_of(checkpoint: Path) -> RunConfig:
    """Reads the config of a checkpoint and makes its paths valid from the current directory.

    Relative paths start where the run was started, unless the run has been moved together with its
    surroundings. If the run did not record that place, they start here.

    Raises:
        UserError: its config.yaml does not belong to this version.
    """
    config = configuration.load_resolved(checkpoint / "config.yaml")
    started = state_of(checkpoint).get("directory") or os.getcwd()
    output_dir = os.path.join(started, config.output_dir)

    def found(path: str) -> str:
        there = os.path.join(started, os.path.expanduser(path))
        moved = checkpoint.parent.parent / os.path.relpath(there, output_dir)
        places = [there, os.path.normpath(moved)]
        return next((place for place in places if os.path.exists(place) or glob.glob(place)), there)

    def placed(corpus: CorpusConfig) -> dict:
        placed: dict = {"store": found(corpus.store) if corpus.store else ""}
        for name in ("passkey", "babilong"):
            made = getattr(corpus, name)
            texts = {"text_files": [found(path) for path in made.text_files]}
            placed[name] = made.model_copy(update=texts)
        return placed

    return config.model_copy(update={"data": config.data.with_corpora(placed)})


def find_checkpoint(path: Path, step: int | None) -> tuple[Path, list[str]]:
    """Picks the checkpoint to load, with a line for each one passed over; see `load_run`."""
    if not path.is_dir():
        raise UserError(f"run {path}: no such directory; name the output_dir of a run")
    if is_checkpoint(path):
        candidates = [Checkpoint(path.resolve())]
        if step not in (None, state_of(path).get("step")):
            raise UserError(f"run {path}: is a checkpoint; name its run to choose step {step}")
    else:
        candidates = RunDirectory(path.resolve()).checkpoints()
        if step is not None:
            steps = [candidate.step for candidate in candidates]
            if step not in steps:
                there = ", ".join(map(str, sorted(steps))) or "none"
                raise UserError(f"run {path}: has no checkpoint of step {step}; there are: {there}")
            candidates = [candidates[steps.index(step)]]
    skipped = []
    for candidate in candidates:
        problem = _problem(candidate)
        if problem is None:
            return candidate.path, skipped
        skipped.append(f"checkpoint {candidate.path}: passed over, {problem}")
    if len(candidates) == 1:
        raise UserError(f"checkpoint {candidates[0].path}: cannot be used, {problem}")
    what = f"none of its {len(candidates)} checkpoints is valid" if candidates else "no checkpoint"
    raise UserError(f"run {path}: {what}; train it first with `infini-ds pretrain CONFIG`")


def _problem(checkpoint: Checkpoint) -> str | None:
    """Tells why a model cannot be read from a checkpoint; checksums only the files it will read."""
    if problem := checkpoint.problem(Depth.SIZES):
        return problem
    try:
        read = [file.name for file in layer_files(checkpoint.path)]
        kept = [name for name in manifest.listed(checkpoint.path) if name.startswith(f"{FOLDER}/")]
    except (OSError, ValueError) as error:  # the run may just have deleted it
        return f"it cannot be read ({error})"
    return checkpoint.problem(Depth.CHECKSUMS, [*read, "config.yaml", "state.json", *kept])


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Maps every parameter from its file, by its name in InfiniTransformer."""
    weights = {}
    for file in layer_files(checkpoint):
        index = int(file.name.split("-")[0].removeprefix("layer_"))
        layer = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        # A tied weight has no file for its second place.
        weights |= {f"layers.{index}.{name}": weight for name, weight in layer.items()}
    return weights


def layer_files(checkpoint: Path) -> list[Path]:
    """Lists DeepSpeed's weight files, one per layer, whatever the number of stages."""
    return sorted(file for file in checkpoint.iterdir() if _LAYER_FILE.fullmatch(file.name))


def tokenizer_of(checkpoint: Path, config: RunConfig) -> Tokenizer:
    """Loads the tokenizer a checkpoint was trained with: its own, its run's, or the store's.

    Args:
        config: config from `config_of`.

    Raises:
        UserError: neither the checkpoint nor its run has one (earlier versions kept it only in the
            store), and the store is gone or has another tokenizer.
    """
    kind = config.data.tokenizer.kind
    if kind == "bytes":
        return load_tokenizer(kind)
    for directory in filter(None, (checkpoint, run_of(checkpoint))):
        if file := kept_tokenizer(directory, kind):
            return load_tokenizer(kind, file)
    try:
        data = Mixture.open(config.data, settings=False)
    except UserError as error:
        raise UserError(
            f"{error}, or put there what the run had, as checkpoint {checkpoint} has no tokenizer "
            "of its own"
        ) from None
    if data.fingerprint != state_of(checkpoint).get("store"):
        raise UserError(
            f"{data.place}: is not what checkpoint {checkpoint} was trained on, "
            "so its tokenizer may differ; put back what the run had there"
        )
    return data.tokenizer


def state_of(checkpoint: Path) -> dict[str, Any]:
    """Reads a checkpoint's state.json; returns an empty dict if that fails."""
    try:
        tree = json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}
