"""Checkpoints in DeepSpeed's universal form, which any layout of processes can load."""

import contextlib
import glob
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import SafetensorError
from torch import Tensor

from infini_ds.config import load_resolved
from infini_ds.errors import RunError
from infini_ds.parallel.deepspeed.module import pipeline_name, single_process_name
from infini_ds.runs import manifest
from infini_ds.runs.shards import KINDS, Shards, has_shards
from infini_ds.system.causes import one_line

# DeepSpeed's universal format must know that a tied weight is on the first and the last stage.
UNIVERSAL_INFO = {
    "universal_checkpoint_info": {
        "universal_checkpoint_version": 0.2,
        "pipeline_replicated_parameter_patterns": ["tied_modules.*"],
    }
}


def universal_of(directory: Path) -> Path:
    """Returns where a checkpoint's universal form is, if it has been made."""
    return directory.with_name(f"universal_{directory.name}")


def make_universal(directory: Path) -> str:
    """Makes a checkpoint's universal form unless it exists; returns the error, or ""."""
    universal = universal_of(directory)
    if (universal / manifest.NAME).exists():
        return ""
    shutil.rmtree(universal, ignore_errors=True)
    if has_shards(directory):
        failure = _shards_to_universal(directory, universal)
    else:
        failure = _to_universal(directory, universal)
    if not failure:
        manifest.write(universal, {})
    return failure


def _shards_to_universal(directory: Path, universal: Path) -> str:
    """Writes what DeepSpeed's converter would write; returns the error, or ""."""
    config = load_resolved(directory / "config.yaml")
    try:
        shards = Shards(directory)
        for name in shards.shapes:
            folder = universal / "zero" / pipeline_name(name, config.model.tie_embeddings)
            folder.mkdir(parents=True)
            for kind in KINDS:
                whole = shards.read(name, kind).view(shards.shapes[name])
                torch.save({"cat_dim": 0, "param": whole}, folder / f"{kind}.pt")
            # As the optimizers keep it: DeepSpeed's for the CPU as a plain number.
            step = shards.step if config.parallel.offload_optimizer else float(shards.step)
            torch.save(step if isinstance(step, int) else torch.tensor(step), folder / "step.pt")
        groups: list[dict] = [{}]  # of settings, which `load_states` takes from the config
        general = {"ds_version": deepspeed.__version__, "param_groups": groups}
        torch.save(general, universal / "zero" / "optimizer_state.pt")
        counts = {"global_steps": shards.step, "skipped_steps": 0}
        sizes = {"dp_world_size": 1, "mp_world_size": 1}  # of whole tensors
        model = {"module": None, **counts, **sizes, **UNIVERSAL_INFO}
        torch.save(model, universal / "mp_rank_00_model_states.pt")
    except (OSError, RunError, SafetensorError) as error:
        return one_line(error)
    return ""


class UniversalStates:
    """The states of a universal form by the names of InfiniTransformer, as `Shards` has them."""

    def __init__(self, directory: Path):
        self._folders = {
            single_process_name(path.name): path
            for path in (directory / "zero").iterdir()
            if path.is_dir()
        }
        steps = (path / "step.pt" for path in self._folders.values())
        self.step = int(next(torch.load(path, weights_only=True) for path in steps))

    def read(self, name: str, kind: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See `Shards`."""
        path = self._folders[name] / f"{kind}.pt"
        whole = torch.load(path, weights_only=True, mmap=True)["param"]
        return whole.flatten()[start:stop]


def _to_universal(directory: Path, universal: Path) -> str:
    """Runs DeepSpeed's converter; returns the error, or ""."""
    command = [sys.executable, "-m", "infini_ds.parallel.deepspeed.to_universal"]
    # The converter treats paths as glob patterns, so it runs in their directory and gets bare
    # names.
    command += ["--input_folder", directory.name, "--output_folder", universal.name]
    # There, a checkout that is not installed would not be found.
    path = os.pathsep.join((str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        command, cwd=directory.parent, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)},
    )  # fmt: skip
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    return ""


@contextlib.contextmanager
def plain_path(directory: Path) -> Iterator[str]:
    """Yields a path without glob characters, since DeepSpeed treats paths as patterns."""
    if glob.escape(str(directory)) == str(directory):
        yield str(directory)
        return
    opened = os.open(directory, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{opened}"
    finally:
        os.close(opened)


def load_by_groups(optimizer: Any, without: Iterable[Tensor]) -> None:
    """Makes a universal form loadable where groups differ from those of the rank that wrote it.

    DeepSpeed loads as many groups as that rank had. It reads the step from a group's first
    parameter, which fails on a rank that has none, such as one of many ranks that share a few
    gates.

    Args:
        without: parameters that are not trained, which the form may lack.
    """
    left_out = set(map(id, without))
    load_all = optimizer.load_hp_checkpoint_state_from_checkpoint_dir

    def load_held(name: str, folder: str) -> None:
        groups, inner = getattr(optimizer, name), optimizer.optimizer
        everything = inner.param_groups
        try:
            for group, settings in zip(groups, everything, strict=True):
                if any(p._hp_mapping is not None and id(p) not in left_out for p in group):
                    setattr(optimizer, name, [group])
                    inner.param_groups = [settings]
                    load_all(name, folder)
        finally:
            setattr(optimizer, name, groups)
            inner.param_groups = everything

    optimizer.load_hp_checkpoint_state_from_checkpoint_dir = load_held
