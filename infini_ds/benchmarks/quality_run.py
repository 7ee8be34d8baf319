"""Trains one variant with one seed, in a process of its own, and reads held-out text with it."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from infini_ds.benchmarks.quality_variants import VARIANTS
from infini_ds.benchmarks.single_trainer import SingleTrainer
from infini_ds.benchmarks.training_runs import Progress
from infini_ds.config import RunConfig
from infini_ds.data.lanes import Plan, held_out_plans
from infini_ds.data.mixture import Mixture
from infini_ds.data.opening import open_data
from infini_ds.evaluation.by_position import (
    means,
    parts_of,
    read_documents,
    window_losses,
    windows_of,
)
from infini_ds.evaluation.token_kinds import KINDS
from infini_ds.model.block import memory_ablated
from infini_ds.model.layers import count_parameters
from infini_ds.model.memory import Memory
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.system.resources import keep_freed_memory

STEP_COST = 3
"""Cost of a forward and a backward pass through a position, in forward passes."""


class Job(NamedTuple):
    """The work of one process."""

    variant: str
    config: RunConfig
    """Config of the variant, with its seed and the store's vocabulary."""
    documents: int
    """Number of held-out documents that are read, counting from the first."""
    bins: list[int]
    """Positions in a document at which the bins of the evaluation begin; the first is 0."""
    kinds: Sequence[np.ndarray] = ()
    """Kinds of the held-out documents' tokens, see `token_kinds`."""


def run_job(job: Job, report: Callable[[Progress], None]) -> dict[str, Any]:
    """Trains and evaluates a variant and returns the figures of this run; see `quality.run`."""
    torch.set_num_threads(1)
    keep_freed_memory()
    store, _ = open_data(job.config)
    variant = VARIANTS[job.variant]
    ways = ("held_out", "ablated") if variant.memory else ("held_out",)
    plans = evaluation_plans(job.config, store, job.documents)
    step_cost = STEP_COST * job.config.train.batch_size
    read_cost = sum(len(plan.lengths) for plan in plans) * len(ways)
    work = job.config.train.steps * step_cost + read_cost
    done, step, loss = 0, 0, math.nan

    def trained(step_loss: float, tokens: int) -> None:
        nonlocal done, step, loss
        done, step, loss = done + step_cost, step + 1, step_loss
        report(Progress(done / work, step, loss, tokens))

    def read(plan: Plan) -> None:
        nonlocal done
        done += len(plan.lengths)
        report(Progress(done / work, step, loss, plan.num_tokens))

    model, figures = train(job, trained)
    held_out, token_bytes = store.split("held_out"), store.tokenizer.token_bytes
    for way in ways:
        with memory_ablated(model.blocks, way == "ablated"):
            totals, by_kind = read_documents(
                model, held_out, plans, job.bins, variant.connected, token_bytes,
                job.config.train.loss_chunk_tokens, read, job.kinds,
            )  # fmt: skip
        kinds = dict(zip(KINDS, parts_of(by_kind), strict=True))
        figures[way] = {**means(totals), "by_kind": kinds}
    return {"seed": job.config.seed, "parameters": count_parameters(job.config.model), **figures}


def train(
    job: Job, report: Callable[[float, int], None]
) -> tuple[InfiniTransformer, dict[str, Any]]:
    """Trains in fp32 from the initial weights, backpropagating through each window.

    Args:
        job: its config gives the steps and the data.
        report: called with the loss and the number of valid tokens of every step.

    Returns:
        The model and the figures of its training. A step whose gradient is not finite is skipped,
        and the lanes' memories are emptied.
    """
    config, began = job.config, time.perf_counter()
    store, lanes = open_data(config)
    trainer = SingleTrainer(config)
    model = trainer.model
    empty = Memory.empty(config.model, config.train.batch_size).layers()
    memory, tokens, loss = empty, 0, math.nan
    for _ in range(config.train.steps):
        plan = lanes.next_plan()
        windows = windows_of(
            store.split("train"), plan, config.model.segment_length, VARIANTS[job.variant].connected
        )
        losses, memory, writes = window_losses(
            model, windows, memory, config.train.loss_chunk_tokens
        )
        mean = (losses * windows.weights).sum() / (windows.weights.sum().item() or 1.0)
        memory = [layer.map(torch.Tensor.detach) for layer in memory]
        if not trainer.step(mean, writes, plan.num_tokens):
            memory = empty
        tokens += plan.num_tokens
        loss = mean.item()
        report(loss, plan.num_tokens)
    width = config.train.window_segments * config.model.segment_length
    return model, {
        "train_positions": config.train.steps * config.train.batch_size * width,
        "train_tokens": tokens,
        "train_loss": loss,
        "skipped_steps": trainer.skipped,
        "train_seconds": time.perf_counter() - began,
    }


def evaluation_plans(config: RunConfig, store: Mixture, documents: int) -> list[Plan]:
    """Plans one pass over the first held-out documents, each of which is read once."""
    lengths = store.split("held_out").lengths[:documents]
    # With more lanes, most of them would wait for the one that reads the longest document.
    lanes = min(config.train.batch_size, int(lengths.sum() // lengths.max()))
    n, window = config.model.segment_length, config.train.window_segments
    return held_out_plans(lengths, n, window, lanes, max_segments=0)
