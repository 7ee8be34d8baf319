"""The model of a run, out of its checkpoints, on one device and without DeepSpeed.

What takes a run or an export alike is `runs.export.load_model`.
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
from infini_ds.data.load_tokenizer import load_tokenizer
from infini_ds.data.mixture import Mixture
from infini_ds.data.tokenizer import Tokenizer
from infini_ds.errors import UserError
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.runs import manifest
from infini_ds.runs.directory import Checkpoint, Depth, RunDirectory
from infini_ds.runs.tokenizer import FOLDER, kept_tokenizer
from infini_ds.system.causes import one_line

_LAYER_FILE = re.compile(r"layer_(\d+)-model_states\.pt")


class Loaded(NamedTuple):
    """A model with what its commands need."""

    model: InfiniTransformer
    """On the CPU, to evaluate; in the dtype that its weights are stored in, but fp16 in fp32."""
    config: RunConfig | ExportConfig
    """Of the run, as `config_of` gives it, or of the export."""
    tokenizer: Tokenizer
    """Of the checkpoint, or of the export."""
    checkpoint: Path
    """Where the weights are from, OUTPUT_DIR/checkpoints/step_XXXXXXXX or the export."""
    step: int
    """Training steps that made the weights, 0 of an export."""
    directory: Path
    """Where reports go: the run's output directory; the export or the checkpoint alone."""
    skipped: list[str]
    """Newer checkpoints that were passed over, a line each with the reason."""

    @property
    def run(self) -> RunConfig | None:
        """The config of the run that the model is from; None of an export."""
        return self.config if isinstance(self.config, RunConfig) else None


def load_run(path: str | Path, step: int | None = None) -> Loaded:
    """Loads the newest valid checkpoint of a run, or a given one.

    Args:
        path: output_dir of a run, or one directory of its checkpoints.
        step: that of the checkpoint to take, where `path` is a run.

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
    """Whether it is a directory named as checkpoints are, or a whole one of another name, and no
    run."""
    named = re.fullmatch(r"step_[0-9]+", path.resolve().name) is not None
    if not named:
        named = all((path / name).is_file() for name in (manifest.NAME, "state.json"))
    return named and path.is_dir() and not is_run(path)


def is_run(path: Path) -> bool:
    """Whether it is a directory with checkpoints, whole or not."""
    return bool(RunDirectory(path).checkpoints())


def run_of(checkpoint: Path) -> Path | None:
    """The directory of the run that a checkpoint lies in, if it was not taken out of it."""
    run = RunDirectory(checkpoint.parent.parent)
    return run.path if Checkpoint(checkpoint) in run.checkpoints() else None


def config_of(checkpoint: Path) -> RunConfig:
    """The config of a checkpoint, with the paths that reading needs as they are now.

    Those are paths from where the run was started, unless the run has been moved together with
    what lies around it. Of a run that did not note where that was, they are from here.

    Raises:
        UserError: its config.yaml is none of this version.
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
        passkey = corpus.passkey
        texts = {"text_files": [found(path) for path in passkey.text_files]}
        store = found(corpus.store) if corpus.store else ""
        return {"store": store, "passkey": passkey.model_copy(update=texts)}

    return config.model_copy(update={"data": config.data.with_corpora(placed)})


def find_checkpoint(path: Path, step: int | None) -> tuple[Path, list[str]]:
    """The checkpoint to take, and what was passed over, a line each; see `load_run`."""
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
    """Why a model cannot be read from it. Only the files that are read are read twice."""
    if problem := checkpoint.problem(Depth.SIZES):
        return problem
    try:
        read = [file.name for file in layer_files(checkpoint.path)]
        kept = [name for name in manifest.listed(checkpoint.path) if name.startswith(f"{FOLDER}/")]
    except (OSError, ValueError) as error:  # as if the run has just deleted it
        return f"it cannot be read ({error})"
    return checkpoint.problem(Depth.CHECKSUMS, [*read, "config.yaml", "state.json", *kept])


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
    """The tokenizer that a checkpoint was trained with: its own, its run's, or that of the store.

    Args:
        config: from `config_of`.

    Raises:
        UserError: it has none (earlier versions kept it in the store alone), and the store that
            has it is gone, or is another one.
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
            "so its tokenizer may be another; put what the run had there"
        )
    return data.tokenizer


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's state.json says, nothing if it cannot be read."""
    try:
        tree = json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}
