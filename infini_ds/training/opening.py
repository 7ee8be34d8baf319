"""Opens a run: data, checkpoint and engine, all checked against the config and each other."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from deepspeed.accelerator import get_accelerator

from infini_ds.cluster.launcher import check_arguments_of_launcher
from infini_ds.config import RunConfig
from infini_ds.data.curriculum import CurriculumLanes
from infini_ds.data.lanes import Lanes
from infini_ds.data.mixture import Mixture
from infini_ds.data.opening import open_data, with_vocabulary
from infini_ds.errors import UserError
from infini_ds.guard.watchdog import Watchdog
from infini_ds.kernels.backend import check_backend
from infini_ds.model.trained import trained_counts
from infini_ds.parallel import weights_on_disk
from infini_ds.parallel.build import build_engine
from infini_ds.parallel.deepspeed.operators import build_async_io, build_cpu_adam
from infini_ds.parallel.engine import Engine
from infini_ds.parallel.ranks import is_first_rank, together, world_size
from infini_ds.system.lock import lock
from infini_ds.training import checkpoint
from infini_ds.training.checkpoint import Saved
from infini_ds.training.compiled import compile_blocks
from infini_ds.training.dtype import with_dtype
from infini_ds.training.kernel_check import with_kernels
from infini_ds.training.start import load_start, open_start


@dataclass(frozen=True)
class Opened:
    """A run that is ready to train; the same on all ranks except for the lock."""

    config: RunConfig
    """The run's config with everything that was left open resolved: vocabulary, dtype, kernels."""
    data: Mixture
    lanes: Lanes | CurriculumLanes
    """The lanes, positioned where the run goes on."""
    engine: Engine
    """The engine with initial weights, or those of init_from; `saved` is not loaded yet."""
    saved: Saved | None
    """The checkpoint that the run resumes from, if any."""
    why_dtype: str
    remarks: list[str]
    """Lines that the user should read."""
    lock: IO | None
    """Keeps other runs out of output_dir while it is open, on rank 0."""


def open_run(config: RunConfig, watchdog: Watchdog, fault: str) -> Opened:
    """Opens a run on all ranks together.

    Args:
        watchdog: receives the engine's progress, and what it waits for.
        fault: what is wrong with the Triton kernels; see `kernel_check.find_fault`.

    Raises:
        UserError: a setting or a file is wrong; raised on all ranks together.
        RunError: a checkpoint cannot be converted to this layout.
    """
    locked = None
    with together():
        check_arguments_of_launcher()
        config.data_parallel_size(world_size())
        if is_first_rank():
            locked = lock(Path(config.output_dir), config.train.timeout / 2)
        data, lanes = open_data(config)
        config = with_vocabulary(config, data)
        trained_counts(config.model, config.optimizer.train)  # it may raise
        device = get_accelerator().device_name()
        check_backend(config.kernels.backend, device, config.model.head_dim)
        if config.parallel.offload_optimizer:
            build_cpu_adam()
        if config.parallel.nvme_path:
            build_async_io()
            weights_on_disk.remove(config)  # what a killed run has left
    if config.parallel.nvme_path:
        with together():
            weights_on_disk.make_folder(config, world_size(), device)
    found, passed_over = checkpoint.find(config)
    if found and not config.resume:
        raise UserError(
            f"output_dir {config.output_dir}: has checkpoints of another run, and resume is "
            "false; choose another output_dir"
        )
    config, why_dtype = with_dtype(config, found)
    config, remarks = with_kernels(config, fault)
    if config.train.compile:
        began = time.monotonic()
        with together():
            compile_blocks(config)
        remarks.append(f"train.compile: blocks compiled in {time.monotonic() - began:.0f} s")
    saved = start = None
    if found:
        with together():
            state = checkpoint.read_state(found, config)
            if state["store"] != data.fingerprint:
                raise UserError(
                    f"{data.place}: not what checkpoint {found} was trained on; "
                    "prepare it as it was, or choose another output_dir"
                )
            lanes.load_state(state["lanes"])
            config, told = _with_packing_of(lanes, config)
            remarks += told
        load_from = checkpoint.source(found, state, config)
        saved = Saved(found, load_from, state)
    elif config.init_from:
        with together():
            start = open_start(config, data)
    universal = saved is not None and saved.load_from != saved.directory
    engine = build_engine(config, universal, watchdog.progress)
    watchdog.waiting_for = lambda: engine.waiting_for
    if start:
        with together():
            load_start(engine, start)
    return Opened(config, data, lanes, engine, saved, why_dtype, passed_over + remarks, locked)


def _with_packing_of(
    lanes: Lanes | CurriculumLanes, config: RunConfig
) -> tuple[RunConfig, list[str]]:
    """Turns packing off if the lanes go on from a state without it, and remarks on that."""
    if lanes.packing == config.packed:
        return config, []
    data = config.data.model_copy(update={"packing": False})
    remark = "data.packing: the run began without packing and goes on without it"
    return config.model_copy(update={"data": data}), [remark]
