"""Checks the Triton kernels on every device of a run, and makes all ranks react alike."""

import os
import socket

from deepspeed.accelerator import get_accelerator

from infini_ds.config import RunConfig
from infini_ds.kernels.backend import TRITON_HEAD_DIMS, distrust
from infini_ds.kernels.self_check import find_fault_apart, settle, trial_of
from infini_ds.parallel.ranks import gathered


def find_fault(config: RunConfig) -> str:
    """Checks the kernels that the config may choose on this rank's device; returns a fault or "".

    Must be called before this process uses its device. Faulty kernels count as missing from then
    on.
    """
    model, device = config.model, get_accelerator().device_name()
    dtype = "fp32" if config.train.dtype == "fp32" else "bf16"
    asked = config.kernels.backend
    chosen = asked == "triton" or (asked == "auto" and dtype == "bf16")
    fits = model.head_dim in TRITON_HEAD_DIMS and model.has_kernels
    if not (chosen and device == "cuda" and fits):
        return ""
    trial = trial_of(
        model.memory_rule, model.num_heads, model.kv_heads, model.head_dim, model.segment_length,
        dtype, config.packed, model.use_sliding_window,
    )  # fmt: skip
    own = f"{device}:{os.environ.get('LOCAL_RANK', '0')}"
    # The other ranks wait for this one no longer than train.timeout.
    fault = find_fault_apart(trial, own, config.train.timeout / 2)
    distrust(fault)
    return fault


def with_kernels(config: RunConfig, fault: str) -> tuple[RunConfig, list[str]]:
    """Switches all ranks to PyTorch's operators if the kernels are wrong on any of them.

    Must be called on all ranks together, so that all compute alike.

    Args:
        fault: the fault on this rank's device, from `find_fault`.

    Returns:
        The config to use, and the lines that tell the user about the switch.
    """
    told = gathered((fault, socket.gethostname()))
    settle()
    wrong = {rank: each for rank, each in enumerate(told) if each[0]}
    if not wrong:
        return config, []
    rank, (first, host) = next(iter(wrong.items()))
    kernels = config.kernels.model_copy(update={"backend": "torch"})
    return config.model_copy(update={"kernels": kernels}), [
        f"kernels.backend: triton {first} (rank {rank} on {host}; {len(wrong)} of {len(told)} "
        "ranks); PyTorch's operators compute instead, on all"
    ]
