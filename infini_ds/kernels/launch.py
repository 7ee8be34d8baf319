"""Starts kernels, or records what would be started so that it can be compiled without a device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

AMPERE, HOPPER, BLACKWELL, RTX_BLACKWELL = 8, 9, 10, 12
"""Major compute capabilities: sm_80, sm_90, sm_100 and sm_120."""

FUSION = {"enable_fp_fusion": True}
"""Of every kernel. Triton 3.9 warns where it is not said, as its default is going to change."""


class Call(NamedTuple):
    """One start of a kernel."""

    kernel: Any
    """A function decorated with triton.jit."""
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """By parameter name: tensors, numbers, compile-time constants."""
    options: dict[str, int]
    """num_warps and num_stages."""


class _Recording(NamedTuple):
    calls: list[Call]
    generation: int


_recording: _Recording | None = None


def launch(kernel: Any, grid: tuple[int, ...], options: dict[str, int], **arguments: Any) -> None:
    """Runs a kernel on the grid, on the device of its tensors; arguments go by name."""
    if _recording is None:
        with torch.cuda.device_of(next(iter(arguments.values()))):
            kernel[grid](**arguments, **options, **FUSION)
    else:
        _recording.calls.append(Call(kernel, grid, arguments, options))


def generation(device: torch.device) -> int:
    """Major compute capability that kernels are started for; the interpreter's is Hopper's."""
    if _recording is not None:
        return _recording.generation
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else HOPPER


def is_recording() -> bool:
    """Whether nothing runs, so that no device is needed."""
    return _recording is not None


@contextmanager
def recording(generation: int) -> Iterator[list[Call]]:
    """Inside it nothing runs: starts are put into the list, and results are left undefined."""
    global _recording
    _recording = _Recording([], generation)
    try:
        yield _recording.calls
    finally:
        _recording = None
