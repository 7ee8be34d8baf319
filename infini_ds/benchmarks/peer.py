"""Implements `infini-ds bench peer`: our training step beside `infini-transformer-pytorch`'s.

Both sides compute the same function: the peer's weights are copied into our model, and the losses
must agree before anything is timed. What the peer lacks is timed beside them with the same weights:
the gated delta rule, and compiled blocks, as by `train.compile`. Each contestant is a separate
process, and all are pinned to the same core and take steps in turn, so that whatever else the
machine does slows all of them alike. A step is a forward and a full backward pass through a window;
peak memory is that of the whole process.

This module does not import torch, because a process counts its parent's memory in its own peak.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from infini_ds.config import ModelConfig
from infini_ds.errors import UserError
from infini_ds.system.console import Console
from infini_ds.system.figures import write_figures

if TYPE_CHECKING:
    from torch import Tensor

PEER = "infini-transformer-pytorch"
CHECK_SEGMENTS = 2
"""Segments over which the fp32 losses must agree; more would add to the measured peak."""
CONTESTANTS = {
    "peer": PEER,
    "ours": "ours",
    "checkpointed": "ours, checkpointing blocks",
    "compiled": "ours, compiling blocks",
    "gated_delta": "ours, gated delta rule",
}

Dtype = Literal["auto", "bf16", "fp32"]


def run(
    json_path: str | None = None,
    segments: Sequence[int] = (512, 1024, 2048),
    repeats: int = 5,
    dtype: Dtype = "auto",
    window_tokens: int = 8192,
) -> list[dict[str, Any]]:
    """Measures all contestants, prints a table, and writes the same rows to `json_path` if given.

    Args:
        json_path: where to write the rows.
        segments: segment lengths; each must divide the window.
        repeats: number of timed steps of each contestant, of which the median counts.
        dtype: type of weights and computation on both sides; "auto" is the faster one here.
        window_tokens: tokens per step.

    Returns:
        One row per segment length.

    Raises:
        UserError: the peer is not installed, or a setting is out of range.
    """
    if importlib.util.find_spec("infini_transformer_pytorch") is None:
        raise UserError(f"bench peer: {PEER} is missing: pip install 'infini-ds[test]'")
    for segment in segments:
        if segment < 1 or window_tokens % segment:
            raise UserError(f"bench peer: segments ({segment}) must divide {window_tokens}")
    if repeats < 1:
        raise UserError(f"bench peer: repeats ({repeats}) must be at least 1")
    if dtype not in ("auto", "bf16", "fp32"):
        raise UserError(f"bench peer: dtype ({dtype}) must be auto, bf16 or fp32")
    rows = [_measure(segment, repeats, dtype, window_tokens) for segment in segments]
    _print(rows)
    write_figures(json_path, rows)
    return rows


def _measure(segment: int, repeats: int, dtype: Dtype, window_tokens: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name in CONTESTANTS:
        connection, other = context.Pipe()
        process = context.Process(
            target=_work, args=(other, name, segment, dtype, window_tokens), daemon=True
        )
        process.start()
        other.close()
        workers[name] = process, connection
    checks, losses, seconds, peaks = {}, {}, {name: [] for name in workers}, {}
    try:
        for name, (_, connection) in workers.items():
            checks[name], dtype = connection.recv()
        apart = abs(checks["peer"] - checks["ours"])
        if apart > 1e-5 * abs(checks["peer"]):
            raise RuntimeError(f"fp32 losses differ at segment {segment}: {checks}")
        for repeat in range(1 + repeats):  # the first step of each warms up and is not timed
            for name, (_, connection) in workers.items():
                connection.send("step")
                step_seconds, losses[name], peaks[name] = connection.recv()
                if repeat:
                    seconds[name].append(step_seconds)
    except EOFError:
        raise RuntimeError("a measured process ended before it reported") from None
    finally:
        for process, connection in workers.values():
            connection.close()
            process.join()
    speed = {name: window_tokens / statistics.median(times) for name, times in seconds.items()}
    row: dict[str, Any] = {"segment": segment, "dtype": dtype, "repeats": repeats}
    row["window_tokens"] = window_tokens
    row |= {f"{name}_tokens_per_second": value for name, value in speed.items()}
    row |= {f"{name}_peak_mib": value for name, value in peaks.items()}
    for name in list(CONTESTANTS)[1:]:
        row[f"{name}_speed_ratio"] = speed[name] / speed["peer"]
        row[f"{name}_memory_ratio"] = peaks[name] / peaks["peer"]
    row |= {f"{name}_loss": value for name, value in losses.items()}
    row["loss_difference"] = abs(losses["ours"] - losses["peer"])
    row["fp32_check_loss_difference"] = apart
    return row


def _work(
    connection: Connection, name: str, segment: int, dtype: Dtype, window_tokens: int
) -> None:
    """Runs one contestant, which sends a result for each step that it is asked for.

    Before that, it sends the fp32 loss of a short text, together with the type of the steps.
    """
    import torch

    from infini_ds.system.compute_type import DTYPES, fastest_type

    if dtype == "auto":
        dtype = fastest_type(torch.device("cpu")).dtype
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    loss_of, model = (_build_peer if name == "peer" else _build_ours)(name, segment)
    tokens = torch.randint(256, (1, window_tokens + 1), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = loss_of(tokens[:, : CHECK_SEGMENTS * segment + 1], False).item()
    connection.send((loss, dtype))
    model.to(DTYPES[dtype])
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        model.zero_grad()
        start = time.perf_counter()
        loss = loss_of(tokens, True).detach()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        connection.send((seconds, loss.item(), peak))


def _peer_model():
    import torch
    from infini_transformer_pytorch import InfiniTransformer

    torch.manual_seed(0)
    model = InfiniTransformer(num_tokens=256, dim=512, depth=4, dim_head=128, heads=8)
    for attention, _ in model.layers:  # their initial values all but shut the memory out
        torch.nn.init.normal_(attention.fastweight_mem.head_gates)
    return model


def _build_peer(_: str, segment: int) -> tuple[Callable[[Tensor, bool], Tensor], Any]:
    from infini_transformer_pytorch import InfiniTransformerWrapper

    model = InfiniTransformerWrapper(
        _peer_model(), segment_length=segment, detach_mems_every_num_segments=10**9
    )
    return lambda tokens, backward: model(tokens, backward=backward), model


def _build_ours(name: str, segment: int) -> tuple[Callable[[Tensor, bool], Tensor], Any]:
    from infini_ds.conversion.seed import from_seed
    from infini_ds.memory import RULES
    from infini_ds.model.transformer import InfiniTransformer
    from infini_ds.system.resources import keep_freed_memory

    keep_freed_memory()  # as the trainer does
    config = ModelConfig(
        vocab_size=256,
        hidden_size=512,
        num_layers=4,
        num_heads=8,
        head_dim=128,
        intermediate_size=int(4 * 512 * 2 / 3),
        segment_length=segment,
        memory_rule=name if name in RULES else "linear",  # type: ignore[arg-type]
        hidden_act="gelu",
        mlp_bias=True,
        head_bias=True,
        norm_eps=1e-30,
    )
    model = InfiniTransformer(
        config, activation_checkpointing="block" if name == "checkpointed" else "none"
    )
    for block in model.blocks:
        block.compiled = name == "compiled"  # type: ignore[arg-type]
    model.load_state_dict(from_seed(_peer_model().state_dict(), config))

    def loss_of(tokens: Tensor, backward: bool) -> Tensor:
        loss = model.loss(tokens)
        if backward:
            loss.backward()
        return loss.detach()

    return loss_of, model


def _print(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    table = Table(
        title=f"one step through {first['window_tokens']:,} tokens, {first['dtype']}, "
        f"one CPU thread, median of {first['repeats']}",
        caption="ratios are to the peer: more speed and less memory are better",
    )
    table.add_column("segment", justify="right")
    table.add_column("contestant")
    for heading in ("tokens/s", "ratio", "peak MiB", "ratio", "loss"):
        table.add_column(heading, justify="right")
    for row in rows:
        for name, title in CONTESTANTS.items():
            table.add_row(
                str(row["segment"]) if name == "peer" else "",
                title,
                f"{row[f'{name}_tokens_per_second']:,.0f}",
                f"{row.get(f'{name}_speed_ratio', 1):.2f}",
                f"{row[f'{name}_peak_mib']:,.0f}",
                f"{row.get(f'{name}_memory_ratio', 1):.2f}",
                f"{row[f'{name}_loss']:.4f}",
                end_section=name == list(CONTESTANTS)[-1],
            )
    console = Console()
    console.print(table)
    worst = max(row["fp32_check_loss_difference"] for row in rows)
    console.print(
        f"Losses of both models on {CHECK_SEGMENTS} segments in fp32 agree to {worst:.1e}; "
        f"in the measured steps to {max(row['loss_difference'] for row in rows):.1e}."
    )
