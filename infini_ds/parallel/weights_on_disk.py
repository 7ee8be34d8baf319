"""Where ZeRO-3 keeps weights on a local disk until they are used (parallel.nvme_path)."""

import hashlib
import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from infini_ds.config import ModelConfig, RunConfig
from infini_ds.errors import UserError
from infini_ds.model.layers import count_parameters, layer_shapes
from infini_ds.system.causes import one_line


class Buffers(NamedTuple):
    """Host memory that takes the weights of a layer from the disk."""

    count: int
    numel: int
    """Numbers in each."""


def buffers(model: ModelConfig, ranks: int) -> Buffers:
    """Returns the buffers that a rank needs: one for its share of each tensor of a layer."""
    layers = layer_shapes(model)
    largest = max(meta.numel() for layer in layers for meta in layer.values())
    return Buffers(max(map(len, layers)), math.ceil(largest / ranks))


def folder_of(config: RunConfig) -> Path:
    """Returns the run's own directory on each machine, which no other run uses."""
    run = hashlib.sha256(os.path.abspath(config.output_dir).encode()).hexdigest()[:16]
    return Path(config.parallel.nvme_path) / f"infini_ds_{run}"


def remove(config: RunConfig) -> None:
    """Removes this machine's files, by one of its ranks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        shutil.rmtree(folder_of(config), ignore_errors=True)


def make_folder(config: RunConfig, ranks: int, device: str) -> None:
    """Makes the run's directory on this machine; train.dtype may still be auto.

    Raises:
        UserError: it cannot be made or written as DeepSpeed writes, or the disk is too small.
    """
    place = f"parallel.nvme_path ({config.parallel.nvme_path})"
    if device == "cpu" and ranks == 1:
        raise UserError(
            f"{place}: must be left out on one CPU process, since DeepSpeed would compute with "
            "buffers that it has given to other weights; start at least two"
        )
    folder = folder_of(config)
    probe = folder / f"probe_{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"{place}: cannot be written, {one_line(error)}") from None
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_DIRECT))
    except OSError:
        raise UserError(
            f"{place}: its file system cannot be written past the system's cache (O_DIRECT); name "
            "a directory on a local disk"
        ) from None
    finally:
        probe.unlink()
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    each = 4 if config.train.dtype == "fp32" else 2
    needed = here * each * count_parameters(config.model) // ranks
    if free < needed:
        raise UserError(
            f"{place}: has {free / 1e9:,.1f} GB free, and the weights of this machine's ranks take "
            f"{needed / 1e9:,.1f}; make room, or name another directory"
        )
