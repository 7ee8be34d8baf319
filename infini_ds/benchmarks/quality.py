"""Implements `infini-ds bench quality`: what the memory gains in language modelling.

The variants of one model (see `quality_variants`) read the same number of positions of the same
store in the same number of steps, and then the same held-out documents, with the memory on and
ablated. Each variant and seed runs in a separate process with one thread, and as many processes run
at the same time as there are cores.

This module does not import torch, so that mistakes are reported at once.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infini_ds.benchmarks.quality_progress import QualityProgress
from infini_ds.benchmarks.quality_variants import variant_config
from infini_ds.config import RunConfig
from infini_ds.data.lanes import held_out_plans
from infini_ds.data.opening import open_data, with_vocabulary
from infini_ds.errors import RunError, UserError
from infini_ds.system.console import Console
from infini_ds.system.figures import write_figures
from infini_ds.system.resources import cores_at_hand

if TYPE_CHECKING:
    from infini_ds.benchmarks.quality_run import Job


def run(
    config: RunConfig,
    variants: Sequence[str],
    seeds: Sequence[int],
    json_path: str | None,
    plot_path: str,
) -> dict[str, Any]:
    """Trains and evaluates all variants, prints a table, and writes the plot and the figures.

    Args:
        config: settings of the model, the store, the training (train.steps) and the optimizer.
        variants: names in `quality_variants.VARIANTS`.
        seeds: seeds of the initial weights and of the order of documents.
        json_path: where to write the figures, if anywhere.
        plot_path: where to write the plot of bits per byte by position in the document.

    Returns:
        The figures: the setup, "variants" (see `quality_report.summarize`) and "conclusion".

    Raises:
        UserError: a setting is wrong, or the store is missing or too small.
        RunError: a process ended before it was done.
    """
    if config.train.curriculum:
        raise UserError("train.curriculum: bench quality reads documents of all lengths; remove it")
    if config.data.weights:
        raise UserError("data.mixture: bench quality reads one corpus; give data.store instead")
    store, _ = open_data(config)
    config = with_vocabulary(config, store)
    for name in variants:
        open_data(variant_config(config, name, seeds[0]))  # a store may be too small for it
    lengths = store.split("held_out").lengths
    read = held_out_plans(
        lengths, config.model.segment_length, config.train.window_segments,
        config.train.batch_size, config.evaluation.max_segments,
    )  # fmt: skip
    documents = 1 + max(int(plan.documents.max()) for plan in read)
    from infini_ds.benchmarks.quality_report import conclusion, summarize, table, write_plot
    from infini_ds.benchmarks.quality_run import Job
    from infini_ds.evaluation.by_position import position_bins

    bins = position_bins(config.model.segment_length, int(lengths[:documents].max()) - 1)
    jobs = [
        Job(name, variant_config(config, name, seed), documents, bins)
        for seed in seeds
        for name in variants
    ]
    console = Console()
    with QualityProgress(console, len(jobs), config.train.steps) as progress:
        results = _run_all(jobs, progress)
    summaries = [
        summarize(name, [figures for job, figures in results if job.variant == name])
        for name in variants
    ]
    figures = {
        "steps": config.train.steps,
        "seeds": list(seeds),
        "batch_size": config.train.batch_size,
        "segment_length": config.model.segment_length,
        "window_length": config.train.window_segments * config.model.segment_length,
        "documents": documents,
        "held_out_tokens": results[0][1]["held_out"]["tokens"],
        "bins": bins,
        "variants": summaries,
        "conclusion": conclusion(summaries, len(seeds)),
    }
    console.print(table(figures))
    for job, result in results:
        if result["skipped_steps"]:
            console.print(
                f"{_name(job)}: {result['skipped_steps']} steps were skipped, as their gradient "
                "was not finite"
            )
    write_plot(figures, Path(plot_path))
    console.print(f"bits per byte by position in the document: {plot_path}")
    write_figures(json_path, figures)
    console.print(figures["conclusion"])
    return figures


def _run_all(jobs: list[Job], progress: QualityProgress) -> list[tuple[Job, dict[str, Any]]]:
    """Runs all jobs and returns each with its figures, in the order of the jobs."""
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(jobs))
    running: dict[Connection, tuple[Job, Any]] = {}
    results: dict[str, dict[str, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < cores_at_hand():
                job = waiting.pop()
                connection, other = context.Pipe()
                process = context.Process(target=_work, args=(other, job), daemon=True)
                process.start()
                other.close()
                running[connection] = job, process
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                job, process = running[connection]
                try:
                    message = connection.recv()
                except EOFError:
                    raise RunError(f"bench quality: {_name(job)} ended too early") from None
                if isinstance(message, dict):
                    results[_name(job)] = message
                    del running[connection]
                    process.join()
                else:
                    progress.update(_name(job), message)
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    return [(job, results[_name(job)]) for job in jobs]


def _work(connection: Connection, job: Job) -> None:
    """Runs one job, which sends its progress and finally its figures."""
    from infini_ds.benchmarks.quality_run import run_job

    connection.send(run_job(job, connection.send))


def _name(job: Job) -> str:
    return f"{job.variant} seed {job.config.seed}"
