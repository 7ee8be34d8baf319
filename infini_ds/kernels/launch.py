"""Launches kernels, or records the launches so that kernels can be compiled without a device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

AMPERE, HOPPER, BLACKWELL, RTX_BLACKWELL = 8, 9, 10, 12
"""Major compute capabilities: sm_80, sm_90, sm_100 and sm_120."""

FUSION = {"enable_fp_fusion": True}
"""Options of every kernel. Triton 3.9 warns if they are left out, as the default will change."""


class Call(NamedTuple):
    """One launch of a kernel."""

    kernel: Any
    """A function decorated with triton.jit."""
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """Tensors, numbers and compile-time constants by parameter name."""
    options: dict[str, int]
    """num_warps and num_stages; empty for Triton's defaults."""


class _Recording(NamedTuple):
    calls: list[Call]
    generation: int


_recording: _Recording | None = None


def launch(kernel: Any, grid: tuple[int, ...], options: dict[str, int], **arguments: Any) -> None:
    """Launches a kernel on the device of its first argument, or records the launch."""
    if _recording is None:
        with torch.cuda.device_of(next(iter(arguments.values()))):
            kernel[grid](**arguments, **options, **FUSION)
    else:
        _recording.calls.append(Call(kernel, grid, arguments, options))


def generation(device: torch.device) -> int:
    """Returns the major compute capability to launch for; Triton's interpreter counts as Hopper."""
    if _recording is not None:
        return _recording.generation
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else HOPPER


def is_recording() -> bool:
    """Returns whether launches are only recorded, so that no device is needed."""
    return _recording is not None


@contextmanager
def recording(generation: int) -> Iterator[list[Call]]:
    """Records launches in the yielded list instead of running them; results are undefined."""
    global _recording
    _recording = _Recording([], generation)
    try:
        yield _recording.calls
    finally:
        _recording = None
