"""Compiles kernels into Triton's cache, as at run time, while the GPU does something else."""

import contextlib
import time
from collections.abc import Iterator
from unittest import mock

import torch

from infini_ds.benchmarks.gpu_check.results import Part
from infini_ds.kernels.infini_attention.reference import Inputs
from infini_ds.kernels.infini_attention.triton import op, window
from infini_ds.layout import Layout
from infini_ds.memory import RULES

OF_TINY = ("sums_kernel", "scan_kernel")
"""Kernels that compile quickly, and are enough to show that the path still works."""


@contextlib.contextmanager
def without_gpu() -> Iterator[None]:
    """Makes kernels compile without running, for this machine's GPU or else for Hopper."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    capability = 90
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor

    class Absent:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    torch.set_num_threads(1)
    absent = mock.patch.object(driver, "_active", Absent())
    with absent, mock.patch.object(window, "generation", return_value=capability // 10):
        yield


def compile_ahead(part: Part, case: str) -> None:
    """Compiles every kernel of one call, forward and backward.

    Args:
        case: rule:segments:n:heads:kv_heads:d:form; gates are in fp32 if the form is "operation",
            as in its benchmarks, and in bf16 if it is "model".
    """
    rule, *sizes, form = case.split(":")
    segments, n, heads, kv_heads, d = map(int, sizes)

    def launch(kernel, grid, options, **arguments) -> None:
        if not part.tiny or kernel.__name__ in OF_TINY:
            kernel.run(grid=grid, warmup=True, **arguments, **options)

    began = time.monotonic()
    widths = (heads, kv_heads, kv_heads)
    size = (1, segments, n, sum(widths), d)
    qkv = torch.empty(size, dtype=torch.bfloat16, requires_grad=True)
    q, k, v = qkv.split(widths, dim=3)
    layout = Layout(
        torch.zeros(1, segments, dtype=torch.bool), torch.full((1, segments), n, dtype=torch.int32)
    )
    gates = torch.float32 if form == "operation" else torch.bfloat16
    beta = torch.zeros(heads, dtype=gates, requires_grad=True)
    rotary = torch.empty(n, d // 2), torch.empty(n, d // 2)
    memory = RULES[rule].empty(1, kv_heads, d)
    inputs = Inputs(q, k, v, None, memory, layout, beta, rule, rotary)
    with without_gpu(), mock.patch.object(window, "launch", launch):
        out, after = op.infini_attention_triton(inputs)
        (out.float().sum() + after.kv.sum() + after.norm.sum()).backward()
    print(case, round(time.monotonic() - began, 1), "s", flush=True)
