"""Compares the cost of carrying the memories along with that of leaving them where they are.

Two engines in the same processes, one for each transport, take training steps in turn on the same
windows. For each of its micro-batches, a stage sends these bytes per step (see `Wire` in
pipeline.payload for the exact sizes; each term is rounded up to 16 bytes):

    to the next stage        per chunk: batch x length x hidden_size x bytes of the dtype
                             + batch x segments x 8 for the layout
                             carried: + per layer, once a window:
                               batch x kv_heads x (head_dim + 1) x head_dim x 4
    to the previous stage    per chunk: batch x length x hidden_size x bytes of the dtype
    last stage to the first  carried: the memories of all layers, once a window
"""

import statistics
import time

import torch.distributed as dist
from rich.table import Table

from infini_ds import config as configuration
from infini_ds.benchmarks.ranks import end, is_rank, random_windows, start
from infini_ds.config import RunConfig
from infini_ds.system.console import Console
from infini_ds.system.figures import write_figures

TIME_LIMIT = 900.0
"""Time limit of the whole benchmark in seconds."""


def run(processes: int, steps: int, dtype: str, json_path: str | None) -> None:
    """Starts the processes, or runs as one of them if a launcher has started this one.

    Args:
        processes: number of pipeline stages.
        steps: number of timed steps of each transport.
        dtype: type of the computation and of the activations that are sent, as train.dtype.
        json_path: where to write the figures as well, if anywhere.
    """
    if is_rank():
        _measure(steps, dtype, json_path)
        end()
    arguments = ["--steps", str(steps), "--dtype", dtype]
    arguments += ["--json", json_path] if json_path else []
    start(processes, "transport", arguments, TIME_LIMIT)


def _measure(steps: int, dtype: str, json_path: str | None) -> None:
    """Runs one process of the benchmark and leaves the process group open."""
    from infini_ds.parallel.build import build_engine, start_distributed
    from infini_ds.parallel.engine import StepSize
    from infini_ds.parallel.ranks import gathered, is_first_rank, world_size
    from infini_ds.training.dtype import with_dtype

    start_distributed(120)
    configs = {
        name: with_dtype(_config(name, world_size(), dtype), None)[0]
        for name in ("carried", "resident")
    }
    engines = {name: build_engine(config) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    sent: dict[str, int] = {}
    size = StepSize(configs["carried"].step_tokens, configs["carried"].step_tokens)
    for step in range(steps + 1):
        for name, engine in engines.items():
            before = engine.sent_bytes
            dist.barrier()
            begin = time.perf_counter()
            lanes = map(engine.lanes_of, range(engine.layout.micro_batches))
            windows = [random_windows(configs[name], step, own) for own in lanes]
            engine.train_step(lambda micro_batch, windows=windows: windows[micro_batch], size, 1.0)
            dist.barrier()
            if step:  # the first step warms up
                seconds[name].append(time.perf_counter() - begin)
            sent[name] = engine.sent_bytes - before
    formula = {name: engine.step_bytes() for name, engine in engines.items()}
    by_rank = gathered((sent, formula))
    if is_first_rank():
        _print(configs["carried"], seconds, by_rank, json_path)
    dist.barrier()


def _print(
    config: RunConfig, seconds: dict[str, list[float]], gathered: list, json_path: str | None
) -> None:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    stages = len(gathered)
    model, train = config.model, config.train
    table = Table(
        title=f"{stages} stages, {model.num_layers} layers of {model.num_heads} heads of "
        f"{model.head_dim}, hidden {model.hidden_size}, {train.batch_size} lanes of "
        f"{train.window_segments} segments of {model.segment_length}, {train.dtype}"
    )
    for column in ("", "carried", "resident", "ratio"):
        table.add_column(column, justify="right" if column else "left")

    def row(title: str, values: dict[str, float] | dict[str, int], form: str) -> None:
        carried, resident = values["carried"], values["resident"]
        ratio = f"{carried / resident:.2f}" if resident else "-"
        table.add_row(title, form.format(carried), form.format(resident), ratio)

    milliseconds = {name: 1e3 * seconds for name, seconds in medians.items()}
    row("step, milliseconds (median)", milliseconds, "{:,.1f}")
    for stage, (sent, formula) in enumerate(gathered):
        row(f"bytes a step sent by stage {stage}", sent, "{:,}")
        row("  by the formula", formula, "{:,}")
    Console().print(table)
    figures = {
        "stages": stages,
        "dtype": train.dtype,
        "seconds": medians,
        "sent_bytes": [sent for sent, _ in gathered],
        "formula_bytes": [formula for _, formula in gathered],
    }
    write_figures(json_path, figures)


def _config(transport: str, stages: int, dtype: str) -> RunConfig:
    return configuration.parse(
        {
            "output_dir": "unused",
            "model": {
                "vocab_size": 4096,
                "hidden_size": 256,
                "num_layers": max(4, stages),
                "num_heads": 4,
                "head_dim": 64,
                "segment_length": 256,
            },
            "data": {"store": "unused", "packing": False},  # the windows are made here
            "train": {"steps": 1, "batch_size": 4, "window_segments": 4, "dtype": dtype},
            "parallel": {"pipeline_stages": stages, "memory_transport": transport},
        },
        "of bench transport",
    )
