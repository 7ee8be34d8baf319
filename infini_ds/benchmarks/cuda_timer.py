"""Measures how long calls take on a CUDA device."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]

REPEATS = 30
SECONDS = 10.0
"""Time limit for one contestant, without its first call, which compiles. It suffices for REPEATS
calls of all but the slowest contestants, which are measured at least once."""
PAUSE_BYTES = 2**29
"""Size of a write that keeps the device busy: 0.2 ms at 3 TB/s, and more than any cache holds."""
MOST_PAUSES = 500
"""Limit on the writes before a call, as a device's queue holds about a thousand operations."""


class CudaTimer:
    """Measures the seconds of a call on the current device by events; returns the median.

    Args:
        hides_host: whether the device is kept busy until the host has started the whole call. In a
            model, the host runs ahead and its work on an operation is hidden. If False, the device
            waits wherever the host is slower, as in a training step of a small model.
        seconds: time limit for all calls together, without the first.
        repeats: the maximum number of calls that are measured.
    """

    def __init__(
        self, hides_host: bool = True, seconds: float = SECONDS, repeats: int = REPEATS
    ) -> None:
        self._hides_host, self._seconds, self._repeats = hides_host, seconds, repeats
        self._pause: _Pause | None = None

    def __call__(self, call: Call) -> float:
        host_seconds(call)  # compiles
        began = time.perf_counter()
        pauses = self._pauses(host_seconds(call)) if self._hides_host else 0
        times = [self._measure(call, pauses)]
        while len(times) < self._repeats and _left(began, self._seconds) > times[-1]:
            times.append(self._measure(call, pauses))
        return statistics.median(times)

    def once(self, call: Call) -> float:
        """Times a single long call by the clock; its kernels should have been compiled before."""
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    def _pauses(self, host: float) -> int:
        """Returns how many writes take 1.5 times as long as the host needs to start a call."""
        if self._pause is None:
            self._pause = _Pause.of(torch.cuda.current_device())
        return min(MOST_PAUSES, math.ceil(1.5 * host / self._pause.seconds))

    def _measure(self, call: Call, pauses: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(pauses):
            self._pause.buffer.zero_()  # type: ignore[union-attr]
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class _Pause(NamedTuple):
    buffer: torch.Tensor
    seconds: float
    """Time that one write of the buffer takes."""

    @classmethod
    def of(cls, device: int) -> "_Pause":
        buffer = torch.empty(PAUSE_BYTES, dtype=torch.uint8, device=f"cuda:{device}")
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        buffer.zero_()
        start.record()
        for _ in range(10):
            buffer.zero_()
        end.record()
        end.synchronize()
        return cls(buffer, start.elapsed_time(end) / 1e4)


def host_seconds(call: Call) -> float:
    """Measures how long the host takes to start a call on an idle device."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    taken = time.perf_counter() - began
    torch.cuda.synchronize()
    return taken


def _left(began: float, seconds: float) -> float:
    return began + seconds - time.perf_counter()
