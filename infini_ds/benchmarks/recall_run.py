"""Trains one variant with one seed on recall, in a process of its own, and asks it."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from infini_ds.benchmarks.single_trainer import SingleTrainer
from infini_ds.benchmarks.training_runs import Progress
from infini_ds.config import ModelConfig, RunConfig
from infini_ds.data.recall import (
    TRAINING,
    Levels,
    Size,
    draw_documents,
    draw_filler,
    recall_random,
)
from infini_ds.evaluation.recall import Questions, measure, measure_whole, tokens_to_read
from infini_ds.layout import IGNORE_INDEX, Layout
from infini_ds.model.layers import count_parameters
from infini_ds.model.memory import Memory
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.runs.export import write_export
from infini_ds.system.resources import keep_freed_memory

STEP_COST = 3
"""Cost of a forward and a backward pass through a position, in forward passes."""
_HISTORY_STEPS = 50


class Job(NamedTuple):
    """The work of one process."""

    variant: str
    config: RunConfig
    """Config of the variant, with its seed."""
    whole: bool
    """Whether one segment holds a whole document, so that the memory is not used."""
    pairs: Sequence[int]
    """Numbers of pairs to train on, one after another."""
    distances: Sequence[int]
    """Numbers of segments between pairs and questions in training, of which each step draws one."""
    questions: Questions
    export: str | None
    """Directory to which the trained model is written, if any."""


class Window(NamedTuple):
    """The documents of a step, from their beginning to their end."""

    tokens: Tensor
    """[batch, segments x n]"""
    labels: Tensor
    """[batch, segments x n]: the value where a key is asked, and IGNORE_INDEX elsewhere."""
    layout: Layout


def run_job(job: Job, report: Callable[[Progress], None]) -> dict[str, Any]:
    """Trains and asks a variant and returns the figures of this run; see `recall.run`."""
    torch.set_num_threads(1)
    keep_freed_memory()
    batch = job.config.train.batch_size
    training = STEP_COST * job.config.train.steps * batch * longest_document(job)
    asking = tokens_to_read(job.questions, job.whole)
    step, read, loss = 0, 0, float("nan")

    def told(tokens: int) -> None:
        done = training * step / job.config.train.steps + read
        report(Progress(done / (training + asking), step, loss, tokens))

    def trained(step_loss: float, tokens: int) -> None:
        nonlocal step, loss
        step, loss = step + 1, step_loss
        told(tokens)

    def asked(tokens: int) -> None:
        nonlocal read
        read += tokens
        told(tokens)

    model, figures = train(job, trained)
    if job.export:
        write_export(model, Path(job.export))
    began = time.process_time()
    results = (measure_whole if job.whole else measure)(model.eval(), job.questions, asked)
    seconds = {"evaluation_cpu_seconds": time.process_time() - began}
    return {"seed": job.config.seed, **figures, **seconds, **results}


def train(
    job: Job, report: Callable[[float, int], None]
) -> tuple[InfiniTransformer, dict[str, Any]]:
    """Trains in fp32 from the initial weights, through whole documents.

    Args:
        report: called with the loss and the number of tokens of every step.

    Returns:
        The model and the figures of its training. A step whose gradient is not finite is skipped.
    """
    config, began, cpu = job.config, time.perf_counter(), time.process_time()
    trainer = SingleTrainer(config)
    levels = Levels(job.pairs, config.train.steps)
    empty = Memory.empty(config.model, config.train.batch_size).layers()
    history = []
    for step in range(config.train.steps):
        pairs = levels.next_pairs()
        window = draw_window(job, step, pairs)
        hidden, _, writes = trainer.model.read_window(window.tokens, window.layout, empty)
        asked = window.labels != IGNORE_INDEX
        labels = window.labels[asked]
        # Few positions have a label, so they alone go through the head.
        logits = trainer.model.logits(hidden[asked]).float()
        loss = F.cross_entropy(logits, labels)
        right = int((logits.detach().argmax(dim=-1) == labels).sum())
        tokens = int(window.layout.lengths.sum())
        trainer.step(loss, writes, tokens)
        levels.done(pairs, right, len(labels))
        history.append((loss.item(), right / len(labels)))
        report(loss.item(), tokens)
    return trainer.model, {
        "parameters": count_parameters(config.model),
        "levels_began": levels.began,
        "history": _averaged(history),
        "skipped_steps": trainer.skipped,
        "train_seconds": time.perf_counter() - began,
        "train_cpu_seconds": time.process_time() - cpu,
    }


def draw_window(job: Job, step: int, pairs: int) -> Window:
    """Draws the documents of a training step, which depend on the seed and the step alone."""
    config = job.config
    random = recall_random(TRAINING, config.seed, step)
    distance = job.distances[int(random.integers(len(job.distances)))]
    size = Size(pairs, job.questions.segment_length, job.questions.keys)
    drawn = draw_documents(random, size, config.train.batch_size)
    filler = draw_filler(random, config.train.batch_size, distance * size.segment_length)
    tokens = np.concatenate((drawn.stated, filler, drawn.asked), axis=1)
    labels = np.full_like(tokens, IGNORE_INDEX)
    labels[:, -drawn.asked.shape[1] :] = drawn.labels
    return _window(tokens, labels, config.model.segment_length)


def _averaged(history: list[tuple[float, float]]) -> list[dict[str, float]]:
    """Returns means of the loss and of the share of right answers over every 50 steps."""
    parts = []
    for begin in range(0, len(history), _HISTORY_STEPS):
        part = history[begin : begin + _HISTORY_STEPS]
        losses, right = (sum(column) / len(part) for column in zip(*part, strict=True))
        parts.append({"step": begin + len(part), "loss": losses, "accuracy": right})
    return parts


def _window(tokens: np.ndarray, labels: np.ndarray, n: int) -> Window:
    """Pads documents to whole segments of n tokens."""
    batch, length = tokens.shape
    segments = -(-length // n)
    rest = ((0, 0), (0, segments * n - length))
    starts = torch.zeros(batch, segments, dtype=torch.bool)
    starts[:, 0] = True
    lengths = (length - n * torch.arange(segments, dtype=torch.int32)).clamp(max=n)
    return Window(
        torch.from_numpy(np.pad(tokens, rest)),
        torch.from_numpy(np.pad(labels, rest, constant_values=IGNORE_INDEX)),
        Layout(starts, lengths.expand(batch, -1).contiguous()),
    )


def longest_document(job: Job) -> int:
    """Returns the tokens of the longest document that is trained on."""
    questions = job.questions
    sizes = [Size(pairs, questions.segment_length, questions.keys) for pairs in job.pairs]
    return max(size.tokens(max(job.distances)) for size in sizes)


def state_numbers(config: ModelConfig, whole: bool) -> int:
    """Returns how many numbers a layer keeps of what it has read of a document.

    They are its memory, or with attention over whole documents all keys and values of one segment.
    """
    if whole:
        return 2 * config.segment_length * config.kv_heads * config.head_dim
    return sum(part.numel() for part in Memory.empty(config, 1, "meta").layers()[0])
