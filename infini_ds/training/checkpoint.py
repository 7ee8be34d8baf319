"""Checkpoints: a directory a step, valid once its manifest is there.

    step_00000100/
        ...                     DeepSpeed's own files: layers, optimizer states
        memory/block_003.lanes_00000.safetensors    compressive memories by block, from a lane on
        tokenizer/              a copy of OUTPUT_DIR/tokenizer, so that it can be read alone
        state.json              step, lanes, layout, store, where the run was started
        config.yaml             the resolved config
        manifest.json           sizes and checksums, written last

Nothing of the run's state is elsewhere: learning rates are a function of the step, the order of
documents of seed and step, and nothing draws from a global random state.
"""

import contextlib
import glob
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from infini_ds.config import RunConfig, dump, parse
from infini_ds.errors import RunError, UserError
from infini_ds.guard.peers import is_lost_contact
from infini_ds.kernels.infini_attention import LayerMemory
from infini_ds.parallel.pipeline.engine import InfiniEngine
from infini_ds.runs import manifest
from infini_ds.runs.tokenizer import copy_kept_tokenizer
from infini_ds.system.causes import cause, one_line

# What DeepSpeed's universal format must know: a tied weight is on the first and the last stage.
UNIVERSAL_INFO = {
    "universal_checkpoint_info": {
        "universal_checkpoint_version": 0.2,
        "pipeline_replicated_parameter_patterns": ["tied_modules.*"],
    }
}


def directory_of(config: RunConfig) -> Path:
    """Where the run's checkpoints are."""
    return Path(config.output_dir) / "checkpoints"


def save(engine: InfiniEngine, config: RunConfig, state: dict[str, Any]) -> Path:
    """Writes the checkpoint of state["step"]; to be called on all ranks together.

    What it makes useless is deleted only after it is valid: older ones but the newest
    train.keep_last - 1, saves that were cut off, and what is left of later steps, which this run
    passed over when it began.

    Raises:
        RunError: it could not be written.
    """
    directory = directory_of(config) / f"step_{state['step']:08d}"
    try:
        _save(engine, config, state, directory)
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_lost_contact(error):
            raise
        raise RunError(
            f"checkpoint {directory} could not be written ({cause(error) or one_line(error)}); the "
            "older ones are kept"
        ) from None
    return directory


def _save(engine: InfiniEngine, config: RunConfig, state: dict[str, Any], directory: Path) -> None:
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(directory, ignore_errors=True)  # of a save that was cut off
        (directory / "memory").mkdir(parents=True)
    dist.barrier()
    with contextlib.redirect_stdout(None):
        engine.save_checkpoint(
            str(directory.parent),
            tag=directory.name,
            client_state={**UNIVERSAL_INFO, "iteration": state["step"]},
            save_latest=False,
        )
    if first:  # DeepSpeed's, which do not work for a pipeline's checkpoints
        for name in ("zero_to_fp32.py", "zero_to_torch.py"):
            (directory.parent / name).unlink(missing_ok=True)
    engine.on_progress("saving weights and optimizer states")
    _save_memories(engine, directory / "memory")
    engine.on_progress("saving memories")
    if first:
        copy_kept_tokenizer(directory.parent.parent, directory)
        (directory / "config.yaml").write_text(dump(config))
        (directory / "state.json").write_text(json.dumps({**state, "layout": _layout(engine)}))
    dist.barrier()
    _write_manifest(directory, engine.on_progress)
    if first:
        _delete_useless(directory, config.train.keep_last)
    dist.barrier()


def _delete_useless(written: Path, keep_last: int) -> None:
    steps = manifest.directories(written.parent)
    place = steps.index(written)
    later, older = steps[:place], steps[place + 1 :]
    finished = [path for path in older if (path / manifest.NAME).exists()]
    kept = finished[: keep_last - 1]
    for path in (*later, *older):
        if path not in kept:
            with contextlib.suppress(OSError):  # it is in the way of nothing
                # No half-deleted directory must look valid.
                (path / manifest.NAME).unlink(missing_ok=True)
                shutil.rmtree(path)


def find(config: RunConfig) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint, and why newer ones were passed over; on all ranks together.

    Checksums are shared out among the ranks.
    """
    skipped = []
    for directory in _shared(manifest.directories(directory_of(config))):
        reason = _problem(directory)
        if reason is None:
            return directory, skipped
        skipped.append(f"checkpoint {directory}: passed over, {reason}")
    return None, skipped


def read_state(directory: Path, config: RunConfig) -> dict[str, Any]:
    """What a checkpoint says of the run, after checking that this config goes on with it.

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
        if before != now:
            raise UserError(
                f"{name} ({now}) must be {before}, as in checkpoint {directory}; change it back, "
                "or start a new run with another output_dir"
            )
    return json.loads((directory / "state.json").read_text())


def source(directory: Path, state: dict[str, Any], config: RunConfig, world: int) -> Path:
    """What this layout of processes loads: the checkpoint itself, or its universal form.

    The universal form is made once, beside the checkpoints; to be called on all ranks together.

    Raises:
        UserError: this checkpoint cannot be loaded in another layout.
        RunError: the conversion failed.
    """
    stages = config.parallel.resolve_stages(world, config.model.num_layers)
    here = {"pipeline": stages, "data": world // stages}
    if state["layout"] == here:
        return directory
    if config.train.dtype == "fp32" and config.parallel.zero_stage == 0:
        saved = state["layout"]
        raise UserError(
            f"checkpoint {directory} is of pipeline degree {saved['pipeline']} and data-parallel "
            f"degree {saved['data']}; without ZeRO it can only be resumed in that layout"
        )
    if failure := _convert(directory, config.train.timeout):
        raise RunError(f"checkpoint {directory} cannot be converted to another layout: {failure}")
    return universal_of(directory)


def _convert(directory: Path, timeout: float) -> str:
    """`make_universal` on rank 0, for which the others wait as long as it takes."""
    conversion = None
    if dist.get_rank() == 0:
        conversion = ThreadPoolExecutor(1).submit(make_universal, directory)
    while True:
        failure = None
        if conversion and wait([conversion], timeout / 4).done:
            failure = conversion.result()
        failure = _shared(failure)  # before anyone's limit
        if failure is not None:
            return failure


def universal_of(directory: Path) -> Path:
    """Where the universal form of a checkpoint is, if it has been made."""
    return directory.with_name(f"universal_{directory.name}")


def make_universal(directory: Path) -> str:
    """Makes the universal form of a checkpoint, unless it is there; what went wrong, or nothing."""
    universal = universal_of(directory)
    if (universal / manifest.NAME).exists():
        return ""
    shutil.rmtree(universal, ignore_errors=True)
    return _to_universal(directory, universal)


def load(engine: InfiniEngine, directory: Path, load_from: Path) -> None:
    """Loads weights and optimizer states from `load_from`, memories from `directory`."""
    groups = engine.optimizer.param_groups
    settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    # In a run that goes back it is not as when the engine was built.
    engine._config.load_universal_checkpoint = load_from != directory
    if load_from != directory:
        _allow_empty_shards(engine.optimizer)
    with contextlib.redirect_stdout(None), _plain(load_from.parent) as folder:
        path, _ = engine.load_checkpoint(folder, tag=load_from.name)
    # The config's learning rates and decay hold, not those of when the checkpoint was written.
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)
    if path is None:
        raise RunError(f"checkpoint {load_from}: DeepSpeed could not load it")
    _load_memories(engine, directory / "memory")


@contextlib.contextmanager
def _plain(directory: Path) -> Iterator[str]:
    """A path to a directory that DeepSpeed, which takes it for a pattern, does not mistake."""
    if glob.escape(str(directory)) == str(directory):
        yield str(directory)
        return
    opened = os.open(directory, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{opened}"
    finally:
        os.close(opened)


def _allow_empty_shards(optimizer: Any) -> None:
    """Lets a universal form be loaded where a group is too small to be on every rank.

    DeepSpeed takes the step from a group's first parameter, and a rank that has none, such as one
    of many that share a few gates, fails.
    """
    load_all = optimizer.load_hp_checkpoint_state_from_checkpoint_dir

    def load_held(name: str, folder: str) -> None:
        groups, inner = getattr(optimizer, name), optimizer.optimizer
        everything = inner.param_groups
        held = [any(p._hp_mapping is not None for p in group) for group in groups]
        setattr(optimizer, name, list(itertools.compress(groups, held)))
        inner.param_groups = list(itertools.compress(everything, held))
        try:
            load_all(name, folder)
        finally:
            setattr(optimizer, name, groups)
            inner.param_groups = everything

    optimizer.load_hp_checkpoint_state_from_checkpoint_dir = load_held


def delete_universal(config: RunConfig) -> None:
    """Removes universal forms, which a later checkpoint has made useless."""
    for path in directory_of(config).glob("universal_step_*"):
        shutil.rmtree(path, ignore_errors=True)


def _layout(engine: InfiniEngine) -> dict[str, int]:
    return {"pipeline": engine.num_stages, "data": engine.dp_world_size}


def _fixed_settings(config: dict[str, Any]) -> list[str]:
    """Settings that change what is learnt, or in what form DeepSpeed stores it."""
    model = [f"model.{name}" for name in config["model"]]
    train = [f"train.{name}" for name in ("batch_size", "window_segments", "dtype")]
    return ["seed", *model, *train, "parallel.zero_stage", "parallel.offload_optimizer"]


def _shared(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _gathered(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _problem(directory: Path) -> str | None:
    problem, files = None, {}
    if dist.get_rank() == 0:
        try:
            files = manifest.read(directory)
        except ValueError as error:
            problem = str(error)
    problem, files = _shared((problem, files))
    if problem:
        return problem
    mine = sorted(files)[dist.get_rank() :: dist.get_world_size()]
    for name in mine:
        try:
            if manifest.sha256(directory / name) != files[name]["sha256"]:
                problem = f"{name} does not have its checksum"
        except OSError as error:
            problem = f"{name} cannot be read ({error.strerror})"
    return next(filter(None, _gathered(problem)), None)


def _write_manifest(directory: Path, on_progress: Callable[[str], None]) -> None:
    names = _shared(manifest.files_of(directory))
    mine = names[dist.get_rank() :: dist.get_world_size()]
    files = {}
    for name in mine:
        size = (directory / name).stat().st_size
        files[name] = {"size": size, "sha256": manifest.sha256(directory / name)}
        on_progress(f"the checksum of {name}")
    gathered = _gathered(files)
    if dist.get_rank() == 0:
        manifest.write(directory, {k: v for part in gathered for k, v in sorted(part.items())})
    dist.barrier()


def _save_memories(engine: InfiniEngine, directory: Path) -> None:
    first_lane = engine.lanes_of(0).start
    for block in engine.memories.blocks:
        memory = engine.memories.stacked(block)
        tensors = {name: tensor.cpu() for name, tensor in memory._asdict().items()}
        save_file(tensors, directory / f"block_{block:03d}.lanes_{first_lane:05d}.safetensors")


def _load_memories(engine: InfiniEngine, directory: Path) -> None:
    """Each rank reads its blocks and lanes, whatever layout wrote them."""
    wanted = range(engine.lanes_of(0).start, engine.lanes_of(engine.micro_batches - 1).stop)
    for block in engine.memories.blocks:
        pieces = []
        for path in sorted(directory.glob(f"block_{block:03d}.lanes_*.safetensors")):
            first = int(path.stem.rpartition("_")[2])
            with safe_open(path, framework="pt") as file:
                kv, norm = file.get_slice("kv"), file.get_slice("norm")
                lanes = kv.get_shape()[0]
                low, high = max(wanted.start - first, 0), min(wanted.stop - first, lanes)
                if low < high:
                    pieces.append(LayerMemory(kv[low:high], norm[low:high]))
        memory = LayerMemory(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))
        assert len(memory.norm) == len(wanted)
        engine.memories.load(block, memory)


def _to_universal(directory: Path, universal: Path) -> str:
    """Runs DeepSpeed's converter; what went wrong, or nothing."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    # From where they are: it takes their paths for patterns.
    command += ["--input_folder", directory.name, "--output_folder", universal.name]
    done = subprocess.run(
        command, cwd=directory.parent, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    manifest.write(universal, {})
    return ""
