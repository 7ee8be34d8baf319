"""Compares the engines: a pipeline, and one stage with ZeRO 1, 2 and 3, on the same processes.

All of them live in the same processes and take training steps in turn, on the same windows and from
the same weights. Their losses must agree.
"""

import statistics
import time
from typing import Any

import torch.distributed as dist
from rich.table import Table

from infini_ds import config as configuration
from infini_ds.benchmarks.ranks import end, is_rank, random_windows, start
from infini_ds.config import RunConfig
from infini_ds.planning.plan import Plan, plan
from infini_ds.system.console import Console
from infini_ds.system.figures import write_figures

TIME_LIMIT = 900.0
"""Time limit of the whole benchmark in seconds."""


def run(processes: int, steps: int, dtype: str, json_path: str | None) -> None:
    """Starts the processes, or runs as one of them if a launcher has started this one.

    Args:
        processes: number of stages of the pipeline, and of ranks of the others.
        steps: number of timed steps of each engine.
        dtype: type of the computation, as train.dtype.
        json_path: where to write the figures as well, if anywhere.
    """
    if is_rank():
        _measure(steps, dtype, json_path)
        end()
    arguments = ["--steps", str(steps), "--dtype", dtype]
    arguments += ["--json", json_path] if json_path else []
    start(processes, "engines", arguments, TIME_LIMIT)


def _measure(steps: int, dtype: str, json_path: str | None) -> None:
    """Runs one process of the benchmark and leaves the process group open."""
    from infini_ds.parallel.build import build_engine, start_distributed
    from infini_ds.parallel.engine import StepSize
    from infini_ds.parallel.ranks import is_first_rank, world_size
    from infini_ds.training.dtype import with_dtype

    start_distributed(120)
    count = world_size()
    layouts = {f"pipeline of {count}": (count, 1)}
    layouts |= {f"ZeRO-{zero} on {count}": (1, zero) for zero in (1, 2, 3)}
    configs = {
        name: with_dtype(_config(*layout, count, dtype), None)[0]
        for name, layout in layouts.items()
    }
    engines = {name: build_engine(config) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    losses: dict[str, float] = {}
    for step in range(steps + 1):
        for name, engine in engines.items():
            config = configs[name]
            lanes = map(engine.lanes_of, range(engine.layout.micro_batches))
            windows = [random_windows(config, step, own) for own in lanes]
            dist.barrier()
            begin = time.perf_counter()
            size = StepSize(config.step_tokens, config.step_tokens)
            done = engine.train_step(lambda i, windows=windows: windows[i], size, 1.0)
            dist.barrier()
            if step:  # the first step warms up
                seconds[name].append(time.perf_counter() - begin)
            losses[name] = done.loss_sum / config.step_tokens
    if is_first_rank():
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        rows = [
            _row(name, config, medians, losses[name], plan(config, count))
            for name, config in configs.items()
        ]
        _print(next(iter(configs.values())), count, rows)
        write_figures(json_path, {"processes": count, "dtype": dtype, "engines": rows})
    dist.barrier()


def _row(
    name: str, config: RunConfig, medians: dict[str, float], loss: float, planned: Plan
) -> dict[str, Any]:
    return {
        "engine": name,
        "tokens_per_second": config.step_tokens / medians[name],
        "ratio": next(iter(medians.values())) / medians[name],
        "loss": loss,
        "sent_bytes": max(stage.sent + stage.reduced for stage in planned.stages),
        "kept_bytes": max(stage.needs.device for stage in planned.stages),
    }


def _print(config: RunConfig, count: int, rows: list[dict[str, Any]]) -> None:
    model, train = config.model, config.train
    table = Table(
        title=f"{count} processes, {model.num_layers} layers, hidden {model.hidden_size}, "
        f"{train.batch_size} lanes of {train.window_segments} segments of {model.segment_length}, "
        f"{train.dtype}",
        caption="sent a step and kept (weights, gradients, optimizer states, memories) by the plan "
        "of the fullest rank; ratio: to the pipeline's speed",
    )
    for heading in ("engine", "tokens/s", "ratio", "loss", "MiB sent", "MiB kept"):
        table.add_column(heading, justify="left" if heading == "engine" else "right")
    for row in rows:
        table.add_row(
            row["engine"], f"{row['tokens_per_second']:,.0f}", f"{row['ratio']:.2f}",
            f"{row['loss']:.5f}", f"{row['sent_bytes'] / 2**20:,.1f}",
            f"{row['kept_bytes'] / 2**20:,.1f}",
        )  # fmt: skip
    Console().print(table)


def _config(stages: int, zero: int, count: int, dtype: str) -> RunConfig:
    return configuration.parse(
        {
            "output_dir": "unused",
            "model": {
                "vocab_size": 4096,
                "hidden_size": 256,
                "num_layers": max(4, count),
                "num_heads": 4,
                "head_dim": 64,
                "segment_length": 256,
            },
            "data": {"store": "unused", "packing": False},  # the windows are made here
            "train": {
                "steps": 1,
                "batch_size": 2 * count,
                "micro_batch_size": 1 if stages > 1 else 2,
                "window_segments": 4,
                "dtype": dtype,
            },
            "parallel": {"pipeline_stages": stages, "zero_stage": zero},
        },
        "of bench engines",
    )
