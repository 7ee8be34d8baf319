"""Compares how long training stands still for a checkpoint, written at once or in the background.

One engine saves in both ways in turn, three times each. The copy in host memory is what a step
waits for in the background; the time until the checkpoint is valid, and what steps take meanwhile,
are told as well.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.table import Table

from infini_ds import config as configuration
from infini_ds.benchmarks.ranks import end, is_rank, random_windows, start
from infini_ds.config import RunConfig
from infini_ds.system.console import Console
from infini_ds.system.figures import write_figures

TIME_LIMIT = 900.0
"""Time limit of the whole benchmark in seconds."""
_REPEATS = 3


def run(processes: int, sizes: Sequence[int], directory: str | None, json_path: str | None) -> None:
    """Starts the processes, or runs as one of them if a launcher has started this one.

    Args:
        processes: number of data-parallel ranks.
        sizes: hidden sizes of the models.
        directory: where to write the checkpoints, which are deleted at the end; by default the
            system's directory for temporary files.
        json_path: where to write the figures as well, if anywhere.
    """
    if is_rank():
        assert directory
        _measure(sizes, Path(directory), json_path)
        end()
    with tempfile.TemporaryDirectory(dir=directory, prefix="bench_save_") as folder:
        arguments = ["--directory", folder, "--sizes", ",".join(map(str, sizes))]
        arguments += ["--json", json_path] if json_path else []
        start(processes, "save", arguments, TIME_LIMIT)


def _measure(sizes: Sequence[int], directory: Path, json_path: str | None) -> None:
    """Runs one process of the benchmark and leaves the process group open."""
    from infini_ds.parallel.build import start_distributed
    from infini_ds.parallel.ranks import is_first_rank, world_size

    start_distributed(300)
    rows = [_row(_config(size, directory / str(size), world_size())) for size in sizes]
    if is_first_rank():
        Console().print(_table(rows, world_size()))
        write_figures(json_path, {"processes": world_size(), "sizes": rows})
    dist.barrier()


def _row(config: RunConfig) -> dict[str, Any]:
    from infini_ds.model.layers import count_parameters
    from infini_ds.parallel.build import build_engine
    from infini_ds.parallel.engine import StepSize
    from infini_ds.training import checkpoint
    from infini_ds.training.background_save import BackgroundSave
    from infini_ds.training.dtype import with_dtype

    config = with_dtype(config, None)[0]
    engine = build_engine(config)
    size = StepSize(config.step_tokens, config.step_tokens)
    lanes = map(engine.lanes_of, range(engine.layout.micro_batches))
    windows = [random_windows(config, 0, own) for own in lanes]
    background = BackgroundSave(engine, config, lambda directory: None)

    def step() -> None:
        engine.train_step(lambda micro_batch: windows[micro_batch], size, 1.0)

    def seconds(work: Callable[[], Any]) -> float:
        dist.barrier()
        begin = time.perf_counter()
        work()
        dist.barrier()
        return time.perf_counter() - begin

    step()
    found: dict[str, list[float]] = {}
    for number in range(_REPEATS):
        first, second = ({"step": 2 * number + i, "skipped_steps": 0} for i in (1, 2))
        taken = {
            "step": seconds(step),
            "blocking": seconds(lambda: checkpoint.save(engine, config, first, lambda done: None)),  # noqa: B023
            "background": seconds(lambda: background.start(second)),  # noqa: B023
            "step_meanwhile": seconds(step),
            "until_valid": seconds(background.finish),
        }
        taken["until_valid"] += taken["background"] + taken["step_meanwhile"]
        for name, value in taken.items():
            found.setdefault(name, []).append(value)
    medians = {name: statistics.median(values) for name, values in found.items()}
    valid = next(Path(config.output_dir).glob("checkpoints/step_*/manifest.json")).parent
    bytes_written = sum(path.stat().st_size for path in valid.rglob("*") if path.is_file())
    return {
        "hidden_size": config.model.hidden_size,
        "parameters": count_parameters(config.model),
        "bytes": bytes_written,
        "seconds": medians,
        "share": medians["background"] / medians["blocking"],
    }


def _table(rows: list[dict[str, Any]], processes: int) -> Table:
    table = Table(
        title=f"a checkpoint by {processes} data-parallel ranks; seconds, medians of {_REPEATS}",
        caption="stands still: what training waits for; share: of what it waits when blocked",
    )
    for column in (
        "parameters", "MB", "blocking stands still", "background stands still", "share",
        "until valid", "a step", "a step meanwhile",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        seconds = row["seconds"]
        table.add_row(
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['bytes'] / 1e6:,.0f}",
            f"{seconds['blocking']:.3f}",
            f"{seconds['background']:.3f}",
            f"{row['share']:.1%}",
            f"{seconds['until_valid']:.3f}",
            f"{seconds['step']:.3f}",
            f"{seconds['step_meanwhile']:.3f}",
        )
    return table


def _config(hidden_size: int, directory: Path, processes: int) -> RunConfig:
    return configuration.parse(
        {
            "output_dir": str(directory),
            "model": {
                "vocab_size": 4096,
                "hidden_size": hidden_size,
                "num_layers": 4,
                "num_heads": hidden_size // 64,
                "head_dim": 64,
                "segment_length": 64,
            },
            "data": {"store": "unused", "packing": False},  # the windows are made here
            "train": {"steps": 1, "batch_size": 2 * processes, "keep_last": 1},
            "parallel": {"pipeline_stages": 1},
        },
        "of bench save",
    )
