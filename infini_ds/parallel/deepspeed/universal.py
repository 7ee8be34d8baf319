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

import torch
from deepspeed.utils import safe_set_full_fp32_param
from torch import Tensor, nn

from infini_ds.runs import manifest
from infini_ds.runs.weights import CheckpointWeights

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
    return _to_universal(directory, universal)


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
    manifest.write(universal, {})
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
        without: parameters that are not trained, which the form may lack; see `load_frozen`.
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


@torch.no_grad()
def load_frozen(parameters: dict[str, nn.Parameter], checkpoint: Path) -> None:
    """Fills parameters that are not trained, which the universal form leaves out.

    Args:
        parameters: by their names in InfiniTransformer.
        checkpoint: of which the form was made.
    """
    weights = CheckpointWeights(checkpoint)
    for name, parameter in parameters.items():
        value = weights.read(name).to(parameter.device)
        parameter.copy_(value)
        safe_set_full_fp32_param(parameter, value.float())
