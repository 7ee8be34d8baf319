"""Times Infini-attention as an operation, beside its floor, PyTorch and full attention."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from infini_ds.benchmarks.cuda_timer import Call
from infini_ds.benchmarks.kernel_cost import Cost, Rates, call_cost
from infini_ds.kernels.infini_attention.parallel import infini_attention_parallel
from infini_ds.kernels.infini_attention.reference import Inputs, infini_attention_reference
from infini_ds.kernels.trial import Operation
from infini_ds.layout import Layout
from infini_ds.memory import RULES, MemoryState

Timer = Callable[[Call], float]
"""Measures the seconds that a call takes."""


class Shape(NamedTuple):
    """A window of batch size 1 with as many key-value heads as heads, and the memory's rule."""

    segments: int
    segment_length: int
    heads: int
    head_dim: int
    rule: str = "linear"


def seconds_if_it_fits(prepare: Callable[[], Call], timer: Timer) -> float | None:
    """Times the call that `prepare` returns; None if either of the two runs out of memory."""
    try:
        return timer(prepare())
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()


def naive(inputs: Inputs) -> tuple[Tensor, MemoryState]:
    """Runs the specification in the type of the operands, with whole score matrices."""
    cos, sin = (table.to(inputs.q.dtype) for table in inputs.rotary)
    return infini_attention_reference(inputs._replace(rotary=(cos, sin)))


def measure_rates(device: str, timer: Timer, size: int) -> Rates:
    """Measures a bf16 product of two matrices [size, size] and a copy of 16 such matrices."""
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    product = timer(lambda: matrix @ matrix)
    source = torch.empty(16, size, size, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = timer(lambda: target.copy_(source))
    return Rates(2 * size**3 / product, 2 * source.nbytes / copy)


def measure_accuracy(operations: dict[str, Operation], shape: Shape, device: str) -> dict[str, Any]:
    """Returns relative errors of results and gradients in bf16, by operation and name."""
    inputs = _inputs(shape, device)
    expected = _results(infini_attention_reference, _converted(inputs, torch.float64))
    norm = ["norm"] if RULES[shape.rule].divides else []
    names = ["out", "kv", *norm, *(f"gradient of {name}" for name in ("q", "k", "v", "beta"))]
    errors = {}
    for name, operation in operations.items():
        parts = zip(expected, _results(operation, inputs), strict=True)
        ratios = [((want - have).norm() / want.norm()).item() for want, have in parts]
        errors[name] = dict(zip(names, ratios, strict=True))
    return errors


def time_operation(
    name: str, operation: Operation, shape: Shape, device: str, timer: Timer, rates: Rates
) -> dict[str, Any]:
    """Times the forward and the backward pass of one operation in bf16."""
    cost = call_cost(*shape)
    row: dict[str, Any] = {"operation": name, **shape._asdict()}
    for way in ("forward", "backward"):
        seconds = seconds_if_it_fits(partial(make_call, operation, shape, device, way), timer)
        row[way] = _figures(seconds, getattr(cost, way), rates)
    return row


def make_call(operation: Operation, shape: Shape, device: str, way: str) -> Call:
    """Prepares one direction of an operation, "forward" or "backward", in bf16."""
    inputs = _inputs(shape, device)
    if way == "forward":
        return partial(operation, inputs)
    outputs = _outputs(operation, inputs)
    upstream = [torch.randn_like(x) for x in outputs]
    return partial(torch.autograd.grad, outputs, _leaves(inputs), upstream, retain_graph=True)


def time_full_attention(
    ours: Operation, tokens: int, shape: Shape, device: str, timer: Timer
) -> dict[str, Any]:
    """Times forward passes: ours segment by segment, FlashAttention over all tokens at once."""

    def prepare_ours() -> Call:
        inputs = _inputs(shape._replace(segments=tokens // shape.segment_length), device)
        return partial(ours, inputs)

    def prepare_full() -> Call:
        size = (1, shape.heads, tokens, shape.head_dim)
        q, k, v = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(3))
        return partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)

    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return {
            "tokens": tokens,
            "segment_length": shape.segment_length,
            "ours_seconds": seconds_if_it_fits(prepare_ours, timer),
            "full_seconds": seconds_if_it_fits(prepare_full, timer),
        }


def _figures(seconds: float | None, cost: Cost, rates: Rates) -> dict[str, float] | None:
    if seconds is None:
        return None
    return {
        "seconds": seconds,
        "flops_per_second": cost.flops / seconds,
        "bytes_per_second": cost.bytes / seconds,
        "to_floor": seconds / cost.floor(rates),
    }


def _inputs(shape: Shape, device: str) -> Inputs:
    """Returns random inputs with an empty memory."""
    segments, n, heads, d, rule = shape
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, segments, n, heads, d, device=device, dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    )
    layout = Layout(
        torch.zeros(1, segments, dtype=torch.bool, device=device),
        torch.full((1, segments), n, dtype=torch.int32, device=device),
    )
    beta = torch.randn(heads, device=device).requires_grad_()
    angles = torch.arange(n, device=device)[:, None] * 1e4 ** -torch.linspace(
        0, 1, d // 2, device=device
    )
    memory = RULES[rule].empty(1, heads, d, device)
    return Inputs(q, k, v, None, memory, layout, beta, rule, (angles.cos(), angles.sin()))


def _leaves(inputs: Inputs) -> list[Tensor]:
    return [inputs.q, inputs.k, inputs.v, inputs.beta]


def _converted(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    q, k, v, beta = (x.detach().to(dtype).requires_grad_() for x in _leaves(inputs))
    memory = MemoryState(*(x.to(dtype) for x in inputs.memory))
    cos, sin = (x.to(dtype) for x in inputs.rotary)
    return inputs._replace(q=q, k=k, v=v, beta=beta, memory=memory, rotary=(cos, sin))


def _outputs(operation: Operation, inputs: Inputs) -> list[Tensor]:
    out, memory = operation(inputs)
    return [out, memory.kv, *([memory.norm] if RULES[inputs.rule].divides else [])]


def _results(operation: Operation, inputs: Inputs) -> list[Tensor]:
    """Returns outputs and gradients, converted to fp64."""
    outputs = _outputs(operation, inputs)
    torch.manual_seed(1)
    upstream = [torch.randn_like(x, dtype=torch.float32).to(x.dtype) for x in outputs]
    gradients = torch.autograd.grad(outputs, _leaves(inputs), upstream)
    return [x.detach().double() for x in (*outputs, *gradients)]


PYTORCH: dict[str, Operation] = {"PyTorch": infini_attention_parallel, "naive PyTorch": naive}
"""PyTorch operations to compare with: tiled local attention (SDPA), and whole score matrices."""
