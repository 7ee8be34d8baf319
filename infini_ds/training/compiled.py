"""Compiles what the blocks of a run have around their attention, before any rank waits for it."""

import os

import torch
from deepspeed.accelerator import get_accelerator

from infini_ds.config import RunConfig
from infini_ds.errors import UserError
from infini_ds.kernels.backend import why_not_compiled
from infini_ds.model.block import Block
from infini_ds.system.causes import cause, one_line, shortened
from infini_ds.system.compute_type import DTYPES
from infini_ds.system.cpp_compiler import why_no_cpp


def compile_blocks(config: RunConfig) -> None:
    """Compiles it in this process for the chunks of a run whose type is resolved.

    The steps of the run compile nothing then. All ranks do this at the same time; left to the first
    step, each stage of a pipeline would begin when the stage before it is done.

    Raises:
        UserError: it cannot be compiled here; the message says what is missing.
    """
    device = torch.device(get_accelerator().current_device_name())
    reason = _missing(device)
    try:
        if not reason:
            _compile(config, device)
    except Exception as error:  # the compiler's own, or a tool's that it calls
        reason = cause(error) or shortened(one_line(error))
    if reason:
        raise UserError(
            f"train.compile: blocks cannot be compiled, {reason}; with false they are computed as "
            "they are"
        )


def _missing(device: torch.device) -> str:
    if device.type == "cpu":
        return why_no_cpp(os.environ.get("CXX", "g++"))
    missing = why_not_compiled()
    return missing and f"as triton {missing}"


def _compile(config: RunConfig, device: torch.device) -> None:
    """Takes a block of zeros through both of its parts, forward and backward."""
    model, train = config.model, config.train
    segments = train.window_segments // (train.chunks * config.parallel.context_parallel)
    size = (train.micro_batch_size, segments * model.segment_length, model.hidden_size)
    dtype = DTYPES[train.dtype]
    with device:
        block = Block(model).to(dtype)
        hidden, attended = (torch.zeros(size, dtype=dtype, requires_grad=True) for _ in range(2))
    block.compiled = True
    parts = (*block.project(hidden), block.feed_forward(hidden, attended))
    torch.stack([part.sum().float() for part in parts if part is not None]).sum().backward()
