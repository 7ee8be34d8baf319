"""Times the operation beside PyTorch and its floor, and each of its kernels."""

import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from infini_ds.benchmarks.cuda_timer import CudaTimer, host_seconds
from infini_ds.benchmarks.gpu_check.correctness import ours
from infini_ds.benchmarks.gpu_check.results import Part
from infini_ds.benchmarks.kernel_cost import Rates, call_cost
from infini_ds.benchmarks.kernels_timing import (
    PYTORCH,
    Shape,
    Timer,
    make_call,
    measure_rates,
    time_operation,
)  # fmt: skip
from infini_ds.config.model import KERNEL_RULES

CONTESTANT_SECONDS = 1.5
SHOWN_KERNELS = 16


def timer_of(part: Part, hides_host: bool = True, seconds: float = CONTESTANT_SECONDS) -> Timer:
    """Returns a timer that uses CUDA events; on a CPU, a simple clock."""
    return _cpu_seconds if part.tiny else CudaTimer(hides_host, seconds)


def shapes(part: Part) -> list[Shape]:
    """Returns shapes with every rule, and with short and long segments."""
    sizes = [(2, 32, 2, 16)] if part.tiny else [(16, 512, 32, 128), (16, 2048, 32, 128)]
    return [Shape(*size, rule) for rule in KERNEL_RULES for size in sizes]


def bench(part: Part) -> None:
    """Times one call of ours and of PyTorch beside the floor, then each kernel of our call."""
    timer = timer_of(part)
    rates = measure_rates(part.device, timer, 64 if part.tiny else 8192)
    part.note("rates", tflops=rates.flops / 1e12, tbytes=rates.bytes / 1e12)
    for shape in shapes(part):
        for name, operation in {"ours": ours(part), **PYTORCH}.items():
            if part.late():
                return
            row = time_operation(name, operation, shape, part.device, timer, rates)
            short = {
                way: row[way] and {
                    "ms": 1e3 * row[way]["seconds"], "to_floor": row[way]["to_floor"]
                }
                for way in ("forward", "backward")
            }  # fmt: skip
            part.note("call", operation=name, rule=shape.rule, n=shape.segment_length, **short)
    for shape in shapes(part):
        for way in ("forward", "backward"):
            if not part.late():
                _of_host_and_kernels(part, shape, way, rates)


def _of_host_and_kernels(part: Part, shape: Shape, way: str, rates: Rates) -> None:
    call = make_call(ours(part), shape, part.device, way)
    floor = getattr(call_cost(*shape), way).floor(rates)
    started = _cpu_seconds if part.tiny else host_seconds
    call()
    host = statistics.median(started(call) for _ in range(2 if part.tiny else 10))
    part.note(
        "kernels", rule=shape.rule, n=shape.segment_length, way=way, host_ms=1e3 * host,
        floor_ms=1e3 * floor, us=_by_kernel(part, call),
    )  # fmt: skip


def _by_kernel(part: Part, call: Callable[[], object], repeats: int = 5) -> dict[str, float]:
    """Returns the microseconds on the device that each kernel takes in one call."""
    activity = ProfilerActivity.CPU if part.tiny else ProfilerActivity.CUDA
    with profile(activities=[activity]) as recorded:
        for _ in range(repeats):
            call()
        if not part.tiny:
            torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in recorded.key_averages():
        taken = event.self_cpu_time_total if part.tiny else event.self_device_time_total
        if taken > 0:
            found[event.key[:48]] = found.get(event.key[:48], 0) + taken / repeats
    most = sorted(found.items(), key=lambda item: -item[1])[:SHOWN_KERNELS]
    return {name: round(taken, 1) for name, taken in most}


def sdpa(part: Part) -> None:
    """Times PyTorch's attention kernels, which compute the local part alone."""
    timer = timer_of(part)
    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    for shape in shapes(part)[: 1 if part.tiny else 2]:
        for backend in (SDPBackend.MATH,) if part.tiny else backends:
            if part.late():
                return
            about = {"backend": backend.name, "n": shape.segment_length}
            try:
                forward, backward = _time_sdpa(part, shape, backend, timer)
            except RuntimeError as error:  # the backend does not run on this card
                part.note("sdpa", **about, error=str(error)[:200])
                continue
            flops = 2 * shape.segments * shape.heads * shape.segment_length**2 * shape.head_dim
            part.note(
                "sdpa", **about, forward_ms=1e3 * forward, backward_ms=1e3 * backward,
                forward_tflops=flops / forward / 1e12,
                backward_tflops=2.5 * flops / backward / 1e12,
            )  # fmt: skip


def _time_sdpa(part: Part, shape: Shape, backend: SDPBackend, timer: Timer) -> tuple[float, float]:
    size = (shape.segments, shape.segment_length, shape.heads, shape.head_dim)
    q, k, v = (
        torch.randn(size, device=part.device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    with sdpa_kernel(backend):
        call = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
        out = call()
        upstream = torch.randn_like(out)
        return timer(call), timer(
            partial(torch.autograd.grad, out, (q, k, v), upstream, retain_graph=True)
        )


def _cpu_seconds(call: Callable[[], object]) -> float:
    import time

    began = time.perf_counter()
    call()
    return time.perf_counter() - began
