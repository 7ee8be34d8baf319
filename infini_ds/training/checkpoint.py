"""Checkpoints: one directory per step, valid once its manifest exists.

    step_00000100/
        ...                     DeepSpeed's own files: layers, optimizer states
        memory/block_003.lanes_00000.safetensors    memories of a block, from a first lane on
        tokenizer/              copy of OUTPUT_DIR/tokenizer, so that the checkpoint stands alone
        state.json              step, lanes, layout, store, where the run was started
        config.yaml             the resolved config
        manifest.json           sizes and checksums, written last

There is no other state: learning rates are a function of the step, the order of documents is a
function of seed and step, and nothing draws from a global random state.
"""

import contextlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
import yaml
from safetensors import SafetensorError

from infini_ds.config import RunConfig, dump, parse
from infini_ds.errors import RunError, UserError
from infini_ds.guard.peers import is_lost_contact
from infini_ds.parallel.deepspeed.universal import make_universal, universal_of
from infini_ds.parallel.engine import Engine
from infini_ds.parallel.ranks import gathered, is_first_rank, share_of, shared, world_size
from infini_ds.runs import manifest
from infini_ds.runs.directory import Checkpoint, Depth, RunDirectory
from infini_ds.runs.shards import has_shards
from infini_ds.runs.tokenizer import copy_kept_tokenizer
from infini_ds.system.causes import cause, one_line


def save(
    engine: Engine, config: RunConfig, state: dict[str, Any], on_progress: Callable[[str], None]
) -> Path:
    """Writes the checkpoint of state["step"]; must be called on all ranks together.

    Args:
        on_progress: called with a description of each piece of work when it is done.

    Once the checkpoint is valid, everything that it makes useless is deleted: all but the newest
    train.keep_last checkpoints, saves that were cut off, and remains of later steps, which this run
    passed over when it began.

    Raises:
        RunError: the checkpoint could not be written.
    """
    directory = RunDirectory(Path(config.output_dir)).checkpoint(state["step"]).path
    try:
        _save(engine, config, state, directory, on_progress)
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_lost_contact(error):
            raise
        raise RunError(
            f"checkpoint {directory} could not be written ({cause(error) or one_line(error)}); the "
            "older ones are kept"
        ) from None
    return directory


def _save(
    engine: Engine,
    config: RunConfig,
    state: dict[str, Any],
    directory: Path,
    on_progress: Callable[[str], None],
) -> None:
    prepare(directory)
    engine.save(directory, state["step"])
    if is_first_rank():
        copy_kept_tokenizer(directory.parent.parent, directory)
        for name, text in texts(engine, config, state).items():
            (directory / name).write_text(text)
    dist.barrier()
    _write_manifest(directory, on_progress)
    if is_first_rank():
        delete_useless(directory, config.train.keep_last)
    dist.barrier()


def prepare(directory: Path) -> None:
    """Makes an empty directory for a checkpoint; must be called on all ranks together."""
    if is_first_rank():
        shutil.rmtree(directory, ignore_errors=True)  # an earlier save may have been cut off
        (directory / "memory").mkdir(parents=True)
    dist.barrier()


def texts(engine: Engine, config: RunConfig, state: dict[str, Any]) -> dict[str, str]:
    """Returns the files of text that rank 0 writes, by their names."""
    layout = {
        "pipeline": engine.layout.pipeline,
        "data": engine.layout.data,
        "zero_stage": config.parallel.zero_stage,
    }
    return {
        "config.yaml": dump(config),
        "state.json": json.dumps({**state, "layout": layout}),
    }


def delete_useless(written: Path, keep_last: int) -> None:
    """Deletes all checkpoints but the newest up to the one just written, and what was cut off."""
    steps = RunDirectory(written.parent.parent).checkpoints()
    place = steps.index(Checkpoint(written))
    later, older = steps[:place], steps[place + 1 :]
    finished = [step for step in older if not step.problem(Depth.FINISHED)]
    kept = finished[: keep_last - 1]
    for step in (*later, *older):
        if step not in kept:
            with contextlib.suppress(OSError):  # a leftover does no harm
                # Without its manifest, a half-deleted directory never looks valid.
                (step.path / manifest.NAME).unlink(missing_ok=True)
                shutil.rmtree(step.path)


def find(config: RunConfig) -> tuple[Path | None, list[str]]:
    """Finds the newest valid checkpoint, and why newer ones were passed over; collective.

    The ranks share the work of comparing checksums.
    """
    skipped = []
    for candidate in shared(RunDirectory(Path(config.output_dir)).checkpoints()):
        reason = _problem(candidate)
        if reason is None:
            return candidate.path, skipped
        skipped.append(f"checkpoint {candidate.path}: passed over, {reason}")
    return None, skipped


class Saved(NamedTuple):
    """A checkpoint that a run resumes from."""

    directory: Path
    load_from: Path
    """Directory with weights and optimizer states for this layout; see `source`."""
    state: dict[str, Any]
    """Contents of its state.json."""


def read_state(directory: Path, config: RunConfig) -> dict[str, Any]:
    """Reads a checkpoint's state, after checking that this config can resume from it.

    Raises:
        UserError: a setting that must not change has changed.
    """
    path = directory / "config.yaml"
    saved = parse(yaml.safe_load(path.read_text()), str(path)).model_dump()
    mine = config.model_dump()
    for name in _fixed_settings(mine):
        section, _, key = name.rpartition(".")
        before = saved[section][key] if section else saved[key]
        now = mine[section][key] if section else mine[key]
        if name == "parallel.zero_stage" and before and now:
            continue  # the forms of 1, 2 and 3 become each other
        if before != now:
            raise UserError(
                f"{name} ({now}) must be {before}, as in checkpoint {directory}; change it back, "
                "or start a new run with another output_dir"
            )
    return json.loads((directory / "state.json").read_text())


def source(directory: Path, state: dict[str, Any], config: RunConfig) -> Path:
    """Returns what this layout of processes loads: the checkpoint itself, or its universal form.

    The universal form is made once, beside the checkpoints. Must be called on all ranks together.

    Raises:
        UserError: this checkpoint cannot be loaded in another layout.
        RunError: the conversion failed.
    """
    world = world_size()
    stages = config.parallel.resolve_stages(world, config.model.num_layers)
    here = {"pipeline": stages, "data": world // stages}
    saved, zero_stage = dict(state["layout"]), config.parallel.zero_stage
    # Earlier versions did not record the stage, which could not be another one.
    zero_before = saved.pop("zero_stage", zero_stage)
    if config.parallel.shards_gradients and has_shards(directory):
        return directory  # shards are read by any number of ranks
    if saved == here and zero_before == zero_stage:
        return directory
    if config.train.dtype == "fp32" and zero_stage == 0:
        raise UserError(
            f"checkpoint {directory} has pipeline degree {saved['pipeline']} and data-parallel "
            f"degree {saved['data']}; without ZeRO it can only be resumed in that layout"
        )
    if failure := _convert(directory, config.train.timeout):
        raise RunError(f"checkpoint {directory} cannot be converted to another layout: {failure}")
    return universal_of(directory)


def _convert(directory: Path, timeout: float) -> str:
    """Calls `make_universal` on rank 0; the others wait as long as it takes."""
    conversion = None
    if is_first_rank():
        conversion = ThreadPoolExecutor(1).submit(make_universal, directory)
    while True:
        failure = None
        if conversion and wait([conversion], timeout / 4).done:
            failure = conversion.result()
        failure = shared(failure)  # each round ends before anyone's time limit
        if failure is not None:
            return failure


def delete_universal(config: RunConfig) -> None:
    """Removes universal forms, which a later checkpoint has made useless."""
    for path in RunDirectory(Path(config.output_dir)).checkpoints_path.glob("universal_step_*"):
        shutil.rmtree(path, ignore_errors=True)


def _fixed_settings(config: dict[str, Any]) -> list[str]:
    """Returns the settings that change what is learned, or how DeepSpeed stores it."""
    model = [f"model.{name}" for name in config["model"]]
    train = [f"train.{name}" for name in ("batch_size", "window_segments", "dtype")]
    stored = ["parallel.zero_stage", "parallel.offload_optimizer"]
    return ["seed", *model, *train, *stored, "optimizer.name", "optimizer.train"]


def _problem(checkpoint: Checkpoint) -> str | None:
    """Returns the first problem that any rank finds, on all ranks; they share the checksums."""
    problem, names = None, []
    if is_first_rank() and not (problem := checkpoint.problem(Depth.SIZES)):
        names = sorted(manifest.listed(checkpoint.path))
    problem, names = shared((problem, names))
    if problem:
        return problem
    mine = share_of(names)
    return next(filter(None, gathered(checkpoint.problem(Depth.CHECKSUMS, mine))), None)


def _write_manifest(directory: Path, on_progress: Callable[[str], None]) -> None:
    names = shared(manifest.files_of(directory))
    mine = share_of(names)
    files = {}
    for name in mine:
        files[name] = manifest.entry(directory / name)
        on_progress(f"the checksum of {name}")
    parts = gathered(files)
    if is_first_rank():
        manifest.write(directory, {k: v for part in parts for k, v in sorted(part.items())})
    dist.barrier()
