"""Implements `infini-ds bench recall`: how many pairs a memory holds, and for how long.

Models with each memory rule, and one that attends to whole documents, are trained on multi-query
associative recall (see `data.recall`) and then asked at growing numbers of pairs and distances.
Each variant and seed runs in a separate process with one thread. A model that is already trained
is asked in the same way.

This module does not import torch, so that mistakes are reported at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from infini_ds.benchmarks.recall_variants import (
    WHOLE,
    check_config,
    check_segments,
    variant_config,
)
from infini_ds.benchmarks.training_runs import print_skipped, run_all
from infini_ds.config import RunConfig
from infini_ds.data.recall import Size, vocabulary
from infini_ds.errors import UserError
from infini_ds.system.console import Console
from infini_ds.system.figures import write_figures
from infini_ds.system.progress import ReadingProgress

if TYPE_CHECKING:
    from infini_ds.evaluation.recall import Questions
    from infini_ds.model.transformer import InfiniTransformer


class Asked(NamedTuple):
    """What the models are asked."""

    pairs: list[int]
    """Numbers of pairs in a document."""
    distances: list[int]
    """Numbers of segments between pairs and questions."""
    documents: int
    """Number of documents in each cell, of which distant ones have a quarter."""
    keys: int
    """Number of different keys, and of values."""


class Training(NamedTuple):
    """What is trained."""

    variants: list[str]
    """Names in `recall_variants.variants`."""
    seeds: list[int]
    """Seeds of the initial weights and of the documents."""
    pairs: list[int]
    """Numbers of pairs in a document, one after another."""
    distances: list[int]
    """Numbers of segments between pairs and questions, of which each step draws one."""
    save: str | None
    """Directory for an export of every trained model, if anywhere."""


def run(
    config: RunConfig, training: Training, asked: Asked, json_path: str | None, plot_path: str
) -> dict[str, Any]:
    """Trains and asks all variants, prints a table, and writes the plot and the figures.

    Args:
        config: settings of the model, the optimizer, train.steps and train.batch_size.
        json_path: where to write the figures, if anywhere.
        plot_path: where to write the plot of accuracy by pairs and distance.

    Returns:
        The figures: the setup, and "variants" (see `recall_report.summarize`).

    Raises:
        UserError: a setting is wrong, or an export exists already.
        RunError: a process ended before it was done.
    """
    check_config(config, asked.keys)
    n = config.model.segment_length
    sizes = [Size(pairs, n, asked.keys) for pairs in training.pairs]
    longest = max(size.tokens(max(training.distances)) for size in sizes)
    runs = [(name, seed) for seed in training.seeds for name in training.variants]
    configs = {
        (name, seed): variant_config(config, name, seed, asked.keys, longest) for name, seed in runs
    }
    exports = {
        (name, seed): f"{training.save}/{name}_seed_{seed}" if training.save else None
        for name, seed in runs
    }
    for path in exports.values():
        if path and Path(path).exists():
            raise UserError(f"--save: {path} exists; choose another directory")
    from infini_ds.benchmarks.recall_report import report, summarize
    from infini_ds.benchmarks.recall_run import Job, run_job, state_numbers
    from infini_ds.evaluation.recall import Questions

    questions = Questions(*asked, n)
    jobs = {
        f"{name} seed {seed}": Job(
            name, configs[name, seed], name == WHOLE, training.pairs, training.distances,
            questions, exports[name, seed],
        )
        for name, seed in runs
    }  # fmt: skip
    results = run_all("bench recall", jobs, run_job, config.train.steps)
    made = list(zip(jobs.values(), results, strict=True))
    summaries = []
    for name in training.variants:
        own = [figures for job, figures in made if job.variant == name]
        numbers = state_numbers(configs[name, training.seeds[0]].model, name == WHOLE)
        summaries.append(summarize(name, numbers, own))
    figures = {
        "config": config.model_dump(),
        "seeds": training.seeds,
        "steps": config.train.steps,
        "batch_size": config.train.batch_size,
        "train_pairs": training.pairs,
        "train_distances": training.distances,
        **_setup(questions),
        "variants": summaries,
    }
    write_figures(json_path, figures)
    console = Console()
    report(figures, plot_path, console)
    print_skipped(zip(jobs, results, strict=True), console)
    if training.save:
        console.print(f"exports: {training.save}")
    return figures


def run_models(
    paths: Sequence[str], asked: Asked, json_path: str | None, plot_path: str
) -> dict[str, Any]:
    """Asks trained models, and reports as `run` does.

    Args:
        paths: exports, runs or checkpoints, whose segments all have one length.

    Returns:
        The figures: the setup, and "variants" with the path of each model as its name.

    Raises:
        UserError: a model cannot be loaded, or has fewer tokens than the task.
    """
    from infini_ds.benchmarks.recall_report import report, summarize
    from infini_ds.benchmarks.recall_run import state_numbers
    from infini_ds.evaluation.recall import Questions, measure, tokens_to_read
    from infini_ds.model.layers import count_parameters

    console = Console()
    models = {path: _load(path, asked.keys, console) for path in paths}
    lengths = {path: model.config.segment_length for path, model in models.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{path} {length}" for path, length in lengths.items())
        raise UserError(f"--model: segments must have one length to be compared ({told})")
    questions = Questions(*asked, lengths[paths[0]])
    total = len(models) * tokens_to_read(questions, whole=False)
    done, summaries = 0, []
    with ReadingProgress(console, "bench recall", total, "tokens") as progress:

        def on_read(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress.update(done, tokens)

        for path, model in models.items():
            figures = measure(model, questions, on_read)
            known = {"seed": None, "parameters": count_parameters(model.config)}
            numbers = state_numbers(model.config, whole=False)
            summaries.append(summarize(path, numbers, [{**known, **figures}]))
    figures = {"seeds": [], **_setup(questions), "variants": summaries}
    write_figures(json_path, figures)
    report(figures, plot_path, console)
    return figures


def _setup(questions: Questions) -> dict[str, Any]:
    return {
        "segment_length": questions.segment_length,
        "pairs": list(questions.pairs),
        "distances": list(questions.distances),
        "documents": questions.documents,
        "keys": questions.keys,
        "chance": 1 / questions.keys,
        "sizes": [
            {
                "pairs": size.pairs,
                "stating_segments": size.stating_segments,
                "asking_segments": size.asking_segments,
            }
            for size in questions.sizes()
        ],
    }


def _load(path: str, keys: int, console: Console) -> InfiniTransformer:
    """Loads a model, which needs no tokenizer if it is an export, and moves it to the GPU if any.

    Raises:
        UserError: it cannot be loaded, or has fewer tokens than the task.
    """
    from infini_ds.runs.export import load_export, load_for_command, open_model
    from infini_ds.system.compute_type import place
    from infini_ds.system.resources import keep_freed_memory

    keep_freed_memory()
    opened = open_model(Path(path))
    size, needed = opened.config.vocab_size, vocabulary(keys)
    if size < needed:
        raise UserError(
            f"--model {path}: its vocabulary ({size}) must be at least {needed}, the tokens of "
            f"--keys {keys}"
        )
    check_segments(f"--model {path}: segment_length", opened.config.segment_length)
    if opened.checkpoint is None:
        model, _ = load_export(path)
    else:
        model = load_for_command(path, None, console).model
    place(model, console)
    return model
