"""Implements `infini-ds bench kernels`: the speed of the Triton kernels on a CUDA device.

The results of the kernels are first compared with the specification in fp64; if they are wrong,
nothing is timed. Times are medians by CUDA events and exclude the time that the host takes to start
an operation (see `cuda_timer`). The floor of a call (see `kernel_cost`) assumes the speed that the
same card reaches in a large matrix product and in a copy. Each contestant has a time limit, and
each row is written as soon as it is measured.
"""

import importlib.util
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.table import Table

from infini_ds.benchmarks import kernels_model
from infini_ds.benchmarks.cuda_timer import CudaTimer
from infini_ds.benchmarks.kernels_timing import (
    PYTORCH,
    Shape,
    Timer,
    measure_accuracy,
    measure_rates,
    time_full_attention,
    time_operation,
)
from infini_ds.config.model import KERNEL_RULES
from infini_ds.errors import RunError, UserError
from infini_ds.kernels.assembler import choose_ptxas
from infini_ds.kernels.trial import Operation
from infini_ds.system.console import Console
from infini_ds.system.figures import write_figures

ERROR_LIMIT = 0.03
"""Limit on relative errors; the largest is in the gradient of beta, a sum that largely cancels."""
OURS = "Triton kernels"
ONCE_TOKENS = 2**19
"""Full attention over more tokens is measured once: it takes seconds, with 2e16 FLOP at 2**20."""


class Sizes(NamedTuple):
    """Sizes at which the benchmark measures."""

    segment_lengths: tuple[int, ...] = (512, 2048)
    segments: int = 16
    heads: int = 32
    head_dim: int = 128
    accuracy: tuple[Shape, ...] = tuple(Shape(4, 256, 4, 128, rule) for rule in KERNEL_RULES)
    full_tokens: tuple[int, ...] = (32_768, 131_072, 1_048_576)
    models: kernels_model.Models = kernels_model.Models()
    matrix: int = 8192


class Timers(NamedTuple):
    """Timers for the different kinds of calls."""

    operation: Timer
    """Times an operation without the host's part."""
    step: Timer
    """Times a step of a whole model, with the host's part."""
    once: Timer
    """Times, by a single call, whatever takes seconds."""


def run(json_path: str | None = None) -> None:
    """Measures on the current CUDA device and prints tables.

    Args:
        json_path: where to write the figures as well, if anywhere.

    Raises:
        UserError: there is no CUDA device with bf16, or Triton is not installed.
        RunError: results are wrong.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        raise UserError(
            "bench kernels: needs a CUDA device of compute capability 8.0 or more; "
            "--compile-only checks the kernels on any machine"
        )
    if importlib.util.find_spec("triton") is None:
        raise UserError("bench kernels: Triton is not installed: pip install triton")
    import triton

    from infini_ds.kernels.infini_attention.triton.op import infini_attention_triton

    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    ptxas = choose_ptxas(10 * device.major + device.minor)
    versions = f"Triton {triton.__version__}, {ptxas}, torch {torch.__version__}"
    print(f"{device.name}, {versions}", flush=True)
    if ptxas.warning:
        print(f"warning: {ptxas.warning}", flush=True)
    about = {"card": device.name, "versions": versions}
    timer = CudaTimer()
    timers = Timers(timer, CudaTimer(hides_host=False), timer.once)

    def save(figures: dict[str, Any]) -> None:
        write_figures(json_path, figures | about)

    figures = measure(infini_attention_triton, "cuda", timers, Sizes(), save)
    about["clocks"] = _clocks(str(device.uuid))
    print(f"after the last measurement: {about['clocks']}")
    save(figures)


def measure(
    ours: Operation,
    device: str,
    timers: Timers,
    sizes: Sizes,
    save: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Returns all figures in the order of the tables, and prints each table once it is measured.

    Args:
        save: called after each row with all figures so far.

    Raises:
        RunError: the results of `ours` differ from those of the specification.
    """
    operations = {OURS: ours, **PYTORCH}
    figures: dict[str, Any] = {"accuracy": {}}

    def add(name: str, row: dict[str, Any]) -> None:
        figures.setdefault(name, []).append(row)
        save(figures)

    for shape in sizes.accuracy:
        figures["accuracy"][shape.rule] = measure_accuracy(operations, shape, device)
        _print_accuracy(figures["accuracy"][shape.rule], shape)
    save(figures)
    _check_accuracy(figures["accuracy"])
    rates = measure_rates(device, timers.operation, sizes.matrix)
    figures["rates"] = rates._asdict()
    shapes = [
        Shape(sizes.segments, n, sizes.heads, sizes.head_dim, rule)
        for rule in reversed(KERNEL_RULES)
        for n in sizes.segment_lengths
    ]
    for shape in shapes:
        for name, operation in operations.items():
            add("calls", time_operation(name, operation, shape, device, timers.operation, rates))
    _print_calls(figures["calls"], sizes, figures["rates"])
    for tokens in sizes.full_tokens:
        timer = timers.once if tokens > ONCE_TOKENS else timers.operation
        add("full_attention", time_full_attention(ours, tokens, shapes[-1], device, timer))
    _print_full(figures["full_attention"])
    for contestant in kernels_model.contestants(sizes.models, sizes.segments):
        timer = timers.once if contestant.once else timers.step
        add("steps", kernels_model.time_step(contestant, device, timer))
    _print_steps(figures["steps"])
    return figures


def _check_accuracy(accuracy: dict[str, Any]) -> None:
    wrong = [
        f"{name} by {error:.1e} ({rule} rule)"
        for rule, errors in accuracy.items()
        for name, error in errors[OURS].items()
        if not error <= ERROR_LIMIT  # NaN is wrong, too
    ]
    if wrong:
        raise RunError(f"bench kernels: wrong results, relative to their size: {', '.join(wrong)}")


def _clocks(uuid: str) -> str:
    """Returns the clocks and the power of the card as nvidia-smi reports them."""
    fields = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit"
    command = ["nvidia-smi", "-i", f"GPU-{uuid}", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "clocks unknown, no nvidia-smi"
    values = zip(fields.split(","), shown.stdout.strip().split(", "), strict=False)
    return ", ".join(f"{name} {value}" for name, value in values)


def _print_accuracy(accuracy: dict[str, Any], shape: Shape) -> None:
    names = next(iter(accuracy.values()))
    table = _table(
        f"relative errors in bf16, {shape.rule} rule, {shape.segments} segments of "
        f"{shape.segment_length}",
        *names,
    )
    for operation, errors in accuracy.items():
        table.add_row(operation, *(f"{error:.1e}" for error in errors.values()))
    Console().print(table)


def _print_calls(calls: list[dict[str, Any]], sizes: Sizes, rates: dict[str, float]) -> None:
    table = _table(
        f"one call, {sizes.segments} segments, {sizes.heads} heads of {sizes.head_dim}, bf16",
        "rule", "segment", "", "milliseconds", "to ours", "TFLOP/s", "TB/s", "to the floor",
        caption=f"floor: {rates['flops'] / 1e12:,.0f} TFLOP/s, {rates['bytes'] / 1e12:.2f} TB/s, "
        "measured on this device",
    )  # fmt: skip
    for row in calls:
        ours = next(
            each for each in calls
            if each["operation"] == OURS
            and (each["rule"], each["segment_length"]) == (row["rule"], row["segment_length"])
        )  # fmt: skip
        for direction in ("forward", "backward"):
            own, base = row[direction], ours[direction]
            start = row["operation"], row["rule"], str(row["segment_length"]), direction
            if own is None:
                table.add_row(*start, "not enough memory")
                continue
            table.add_row(
                *start,
                f"{1e3 * own['seconds']:.3f}",
                f"{own['seconds'] / base['seconds']:.2f}" if base else "-",
                f"{own['flops_per_second'] / 1e12:.1f}",
                f"{own['bytes_per_second'] / 1e12:.2f}",
                f"{own['to_floor']:.2f}",
            )
    Console().print(table)


def _print_full(rows: list[dict[str, Any]]) -> None:
    table = _table(
        f"forward, our segments of {rows[0]['segment_length']} beside full causal attention",
        "ours, milliseconds", "FlashAttention (SDPA)", "ratio",
    )  # fmt: skip
    for row in rows:
        ours, full = row["ours_seconds"], row["full_seconds"]
        ratio = f"{full / ours:.2f}" if ours is not None and full is not None else "-"
        table.add_row(f"{row['tokens']:,} tokens", _milliseconds(ours), _milliseconds(full), ratio)
    Console().print(table)


def _print_steps(rows: list[dict[str, Any]]) -> None:
    table = _table(
        "forward and backward, batch 1, bf16", "tokens", "milliseconds", "tokens/s", "MFU"
    )
    for row in rows:
        rate, mfu = row["tokens_per_second"], row["mfu"]
        table.add_row(
            row["name"],
            f"{row['tokens']:,}",
            _milliseconds(row["seconds"]),
            f"{rate:,.0f}" if rate is not None else "-",
            f"{mfu:.1%}" if mfu is not None else "-",
        )
    Console().print(table)


def _milliseconds(seconds: float | None) -> str:
    return f"{1e3 * seconds:,.3f}" if seconds is not None else "not enough memory"


def _table(title: str, *headings: str, caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption)
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
