"""Implements `infini-ds bench context`: windows on one rank, and shared by several, side by side.

For each number of ranks, processes of their own train on windows of random tokens, one thread each.
They are started in turn, so that whatever else the machine does slows all alike. Memory is what the
fullest process takes for its first step over what it had before, mostly activations and gradients;
large blocks have pages of their own then. The steps after it keep freed memory, as training does,
and are timed.
"""

import json
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.table import Table

from infini_ds.benchmarks.ranks import end, is_rank, random_windows, start
from infini_ds.config import RunConfig
from infini_ds.errors import UserError
from infini_ds.planning.report import vocab_size
from infini_ds.system.console import Console
from infini_ds.system.figures import write_figures
from infini_ds.system.resources import (
    give_blocks_their_own_pages,
    keep_freed_memory,
    memory_taken,
)

TIME_LIMIT = 3600.0
"""Time limit of one start in seconds."""
MIB = 2**20


class Source(NamedTuple):
    """The config of a run, and how the command was told of it."""

    path: str
    overrides: list[str]
    config: RunConfig


class Starts(NamedTuple):
    """How often each number of ranks is started, and how many steps it takes then."""

    count: int
    steps: int
    """Timed steps of a start, after one whose memory is measured; the first of several warms up."""


def run(
    source: Source, windows: list[int], ranks: list[int], starts: Starts, json_path: str | None
) -> list[dict[str, Any]]:
    """Measures each length of windows with each number of ranks, and prints a table.

    In a process that it has started, it takes that one's steps.

    Args:
        windows: tokens in a window; empty for the config's.
        ranks: numbers of ranks that share it.
        starts: of each, whose median counts.
        json_path: where to write the rows, if anywhere.

    Returns:
        One row for each length and number of ranks.

    Raises:
        UserError: the vocabulary is not known, or a length of windows does not fit.
    """
    config = source.config
    if is_rank():
        _measure(config, starts.steps, json_path)
        end()
    vocabulary = f"model.vocab_size={vocab_size(config)}"
    windows = windows or [config.train.window_segments * config.model.segment_length]
    settings = {
        (tokens, count): [vocabulary, *_settings(config, tokens, count)]
        for tokens, count in product(windows, ranks)
    }
    rows: list[dict[str, Any]] = []
    for tokens in windows:
        results: dict[int, list[dict[str, Any]]] = {count: [] for count in ranks}
        for _ in range(starts.count):
            for count, own in results.items():
                own.append(_start(source, settings[tokens, count], count, starts.steps))
        rows += [_row(tokens, count, own) for count, own in results.items()]
    _print(rows, config, starts.count)
    write_figures(json_path, rows)
    return rows


def _settings(config: RunConfig, tokens: int, count: int) -> list[str]:
    """Returns the settings of a run in which `count` ranks share windows of so many tokens."""
    n, chunks = config.model.segment_length, config.train.chunks
    if tokens < 1 or tokens % (n * chunks * count):
        raise UserError(
            f"--windows ({tokens}) must be a multiple of model.segment_length ({n}) x train.chunks "
            f"({chunks}) x --ranks ({count})"
        )
    return [
        f"train.window_segments={tokens // n}",
        "parallel.pipeline_stages=1",
        f"parallel.context_parallel={count}",
    ]


def _start(source: Source, settings: list[str], count: int, steps: int) -> dict[str, Any]:
    """Starts the ranks and returns what they measured."""
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result.json"
        arguments = [source.path, *source.overrides, *settings]
        arguments += ["--steps", str(steps), "--json", str(result)]
        start(count, "context", arguments, TIME_LIMIT)
        return json.loads(result.read_text())


def _row(tokens: int, count: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = statistics.median(result["seconds"] for result in results)
    return results[0] | {
        "window": tokens,
        "ranks": count,
        "seconds": seconds,
        "waiting": statistics.median(result["waiting"] for result in results),
        "tokens_per_second": results[0]["tokens"] / seconds,
        "step_bytes": max(result["step_bytes"] for result in results),
        "process_bytes": max(result["process_bytes"] for result in results),
    }


def _print(rows: list[dict[str, Any]], config: RunConfig, repeats: int) -> None:
    model, train = config.model, config.train
    table = Table(
        title=f"{model.num_layers} layers of {model.hidden_size}, segments of "
        f"{model.segment_length}, {train.batch_size} lanes, {train.chunks} chunks, checkpointing "
        f"{train.activation_checkpointing}, {rows[0]['dtype']}, median of {repeats} starts",
        caption="waits: share of the step that the rank which waits longest waits for the others; "
        "memory of the fullest rank: what a step takes, that by tokens of the window, and "
        "what the process takes with gaps between blocks; bytes that a rank sends in a step to "
        "those that share its windows",
    )
    headings = (
        "window",
        "ranks",
        "s a step",
        "tokens/s",
        "",
        "waits",
        "step",
        "a token",
        "",
        "process",
    )
    for heading in (*headings, "sent", "by formula"):
        table.add_column(heading, justify="right")
    base = rows[0]
    for row in rows:
        if row["window"] != base["window"]:
            base = row
        tokens = row["tokens"]
        table.add_row(
            f"{row['window']:,}",
            str(row["ranks"]),
            f"{row['seconds']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
            f"x {row['tokens_per_second'] / base['tokens_per_second']:.2f}",
            f"{row['waiting']:.1%}",
            f"{row['step_bytes'] / MIB:,.0f} MiB",
            f"{row['step_bytes'] / tokens:,.0f} B",
            f"{row['step_bytes'] / base['step_bytes']:.0%}",
            f"{row['process_bytes'] / MIB:,.0f} MiB",
            f"{max(row['exchanged_bytes']):,}",
            f"{max(row['formula_bytes']):,}",
        )
    Console().print(table)


def _measure(config: RunConfig, steps: int, json_path: str | None) -> None:
    """Takes the steps of one rank, and leaves the process group open."""
    from infini_ds.parallel.build import build_engine, start_distributed
    from infini_ds.parallel.engine import StepResult, StepSize
    from infini_ds.parallel.ranks import gathered, is_first_rank
    from infini_ds.training.dtype import with_dtype

    start_distributed(config.train.timeout)
    config, _ = with_dtype(config, None)
    torch.set_num_threads(1)
    engine = build_engine(config)
    size = StepSize(config.step_tokens, config.step_tokens)

    def step(index: int) -> StepResult:
        lanes = map(engine.lanes_of, range(engine.layout.micro_batches))
        windows = [random_windows(config, index, own) for own in lanes]
        dist.barrier()
        return engine.train_step(lambda micro_batch: windows[micro_batch], size, 1.0)

    give_blocks_their_own_pages()
    before, sent = memory_taken("VmRSS"), engine.exchanged_bytes
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    step(0)
    taken, sent = memory_taken("VmHWM") - before, engine.exchanged_bytes - sent
    keep_freed_memory()
    seconds, waited = [], []
    for index in range(1, 1 + steps):
        begin = time.perf_counter()
        result = step(index)
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
        waited.append(result.seconds.get("waiting_for_context", 0.0) / seconds[-1])
    formula = engine.part.step_exchange_bytes(config.model, config.train.chunks)
    told = gathered(
        (taken, memory_taken("VmHWM"), sent, formula, statistics.median(waited[1:] or waited))
    )
    if is_first_rank():
        taken, peaks, sent, formula, waiting = zip(*told, strict=True)
        figures = {
            "seconds": statistics.median(seconds[1:] or seconds),
            "waiting": max(waiting),
            "dtype": config.train.dtype,
            "tokens": config.step_tokens,
            "step_bytes": max(taken),
            "process_bytes": max(peaks),
            "exchanged_bytes": sent,
            "formula_bytes": formula,
        }
        write_figures(json_path, figures)
    dist.barrier()
