"""Implements `infini-ds bench packing`: useful tokens, and their speed, packed and not.

Documents are random tokens of lognormal lengths. The share of useful tokens is that of an epoch of
many documents. Speed is measured on windows of the same documents, packed and not in turn, so that
whatever else the machine does slows both alike. A step is a forward and a full backward pass on one
process; tokens per second count useful tokens alone.
"""

import statistics
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from infini_ds.config import ModelConfig
from infini_ds.data.lanes import Lanes
from infini_ds.data.packing import useful_share
from infini_ds.data.store import Split
from infini_ds.data.windows import read_windows
from infini_ds.model.head import token_losses
from infini_ds.model.memory import Memory
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.system.compute_type import DTYPES, device_at_hand, fastest_type
from infini_ds.system.console import Console
from infini_ds.system.figures import write_figures
from infini_ds.system.resources import keep_freed_memory

LANES, WINDOW_SEGMENTS = 2, 2
EPOCH_DOCUMENTS = 2**17
"""Documents from which the share of useful tokens is taken."""
TIMED_DOCUMENTS = 2**12


class Lengths(NamedTuple):
    """A lognormal distribution of documents' lengths, in tokens."""

    name: str
    median: int
    mean: int

    def draw(self, count: int) -> np.ndarray:
        """Draws lengths, the same ones every time: int64 [count], at least 2."""
        random = np.random.Generator(np.random.PCG64(0))
        deviation = np.sqrt(2 * np.log(self.mean / self.median))
        drawn = random.lognormal(np.log(self.median), deviation, count)
        return np.maximum(drawn.astype(np.int64), 2)


KINDS = (Lengths("web", 500, 1000), Lengths("code", 800, 3000))


def run(segment_length: int, steps: int, dtype: str, json_path: str | None) -> list[dict[str, Any]]:
    """Measures each kind of lengths, prints a table, and writes the same rows if asked to.

    Args:
        segment_length: tokens per segment.
        steps: number of timed steps, packed and not; their median counts.
        dtype: type of weights and computation; "auto" is the fastest one here.
        json_path: where to write the rows, if anywhere.

    Returns:
        One row for each kind.
    """
    keep_freed_memory()
    device = device_at_hand()
    dtype = fastest_type(device).dtype if dtype == "auto" else dtype
    model = _model(segment_length).to(device, DTYPES[dtype])
    rows = [_measure(kind, model, steps) for kind in KINDS]
    _print(rows, model.config, steps, dtype)
    write_figures(json_path, rows)
    return rows


def _model(segment_length: int) -> InfiniTransformer:
    config = ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        head_dim=64,
        segment_length=segment_length,
    )
    return InfiniTransformer(config)


def _measure(kind: Lengths, model: InfiniTransformer, steps: int) -> dict[str, Any]:
    n = model.config.segment_length
    every = kind.draw(EPOCH_DOCUMENTS)
    row: dict[str, Any] = {"kind": kind.name, "median": kind.median, "mean": kind.mean}
    lanes = {}
    lengths = every[:TIMED_DOCUMENTS]
    for name, packing in (("unpacked", False), ("packed", True)):
        row[f"{name}_useful_tokens"] = useful_share(every, n, packing)
        lanes[name] = Lanes(lengths, n, WINDOW_SEGMENTS, LANES, seed=0, packing=packing)
    split = _split(lengths, model.config.vocab_size)
    speeds: dict[str, list[float]] = {name: [] for name in lanes}
    for step in range(steps + 1):
        for name, own in lanes.items():
            speed = _step(model, split, own)
            if step:  # the first step warms up
                speeds[name].append(speed)
    for name, each in speeds.items():
        row[f"{name}_tokens_per_second"] = statistics.median(each)
    row["ratio"] = row["packed_tokens_per_second"] / row["unpacked_tokens_per_second"]
    return row


def _split(lengths: np.ndarray, vocab_size: int) -> Split:
    """Documents of these lengths, made of random tokens."""
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    random = np.random.Generator(np.random.PCG64(1))
    return Split(random.integers(vocab_size, size=offsets[-1], dtype=np.uint16), offsets)


def _step(model: InfiniTransformer, split: Split, lanes: Lanes) -> float:
    """Makes one step; returns its useful tokens per second."""
    plan = lanes.next_plan()
    weight = model.layers[0].weight
    assert isinstance(weight, Tensor)
    windows = read_windows(split, plan, range(LANES), model.config.segment_length)
    windows = windows.to(weight.device)
    memory = Memory.empty(model.config, LANES, weight.device, weight.dtype).layers()
    model.zero_grad()
    _wait(weight.device)
    begin = time.perf_counter()
    hidden, _, _ = model.read_window(windows.tokens, windows.layout, memory)
    token_losses(hidden, *model.head(), windows.labels, 0).sum().backward()
    _wait(weight.device)
    return plan.num_tokens / (time.perf_counter() - begin)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _print(rows: list[dict[str, Any]], config: ModelConfig, steps: int, dtype: str) -> None:
    table = Table(
        title=f"{config.num_layers} layers of {config.hidden_size}, {LANES} lanes of "
        f"{WINDOW_SEGMENTS} segments of {config.segment_length}, {dtype}, "
        f"{torch.get_num_threads()} threads, median of {steps} steps",
        caption="useful: share of positions with a token; tokens/s counts these alone",
    )
    table.add_column("documents (median, mean)")
    for heading in ("useful", "packed", "ratio", "tokens/s", "packed", "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        useful, packed = row["unpacked_useful_tokens"], row["packed_useful_tokens"]
        table.add_row(
            f"{row['kind']} ({row['median']:,}, {row['mean']:,})",
            f"{useful:.1%}",
            f"{packed:.1%}",
            f"{packed / useful:.2f}",
            f"{row['unpacked_tokens_per_second']:,.0f}",
            f"{row['packed_tokens_per_second']:,.0f}",
            f"{row['ratio']:.2f}",
        )
    Console().print(table)
