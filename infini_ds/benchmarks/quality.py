"""Implements `infini-ds bench quality`: what the memory gains in language modelling.

The variants of one model (see `quality_variants`) read the same number of positions of the same
store in the same number of steps, and then the same held-out documents, with the memory on and
ablated. Each variant and seed runs in a separate process with one thread, and as many processes run
at the same time as there are cores.

This module does not import torch, so that mistakes are reported at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infini_ds.benchmarks.quality_variants import variant_config
from infini_ds.benchmarks.training_runs import print_skipped, run_all
from infini_ds.config import RunConfig
from infini_ds.data.lanes import held_out_plans
from infini_ds.data.opening import open_data, with_vocabulary
from infini_ds.errors import UserError
from infini_ds.system.console import Console
from infini_ds.system.figures import write_figures


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
    from infini_ds.benchmarks.quality_report import (
        conclusion,
        kinds_table,
        summarize,
        table,
        write_plot,
    )
    from infini_ds.benchmarks.quality_run import Job, run_job
    from infini_ds.evaluation.by_position import position_bins
    from infini_ds.evaluation.token_kinds import token_kinds

    n, held_out = config.model.segment_length, store.split("held_out")
    bins = position_bins(n, int(lengths[:documents].max()) - 1)
    texts = [held_out.tokens(place, 0, int(lengths[place])) for place in range(documents)]
    kinds = token_kinds(store.split("train"), texts, config.model.vocab_size, n)
    jobs = {
        f"{name} seed {seed}": Job(name, variant_config(config, name, seed), documents, bins, kinds)
        for seed in seeds
        for name in variants
    }
    runs = run_all("bench quality", jobs, run_job, config.train.steps)
    results = list(zip(jobs, runs, strict=True))
    summaries = [
        summarize(name, [figures for job, figures in results if jobs[job].variant == name])
        for name in variants
    ]
    figures = {
        "steps": config.train.steps,
        "seeds": list(seeds),
        "batch_size": config.train.batch_size,
        "segment_length": config.model.segment_length,
        "window_length": config.train.window_segments * config.model.segment_length,
        "documents": documents,
        "held_out_tokens": runs[0]["held_out"]["tokens"],
        "bins": bins,
        "variants": summaries,
        "conclusion": conclusion(summaries, len(seeds)),
    }
    console = Console()
    console.print(table(figures))
    console.print(kinds_table(figures))
    print_skipped(results, console)
    write_plot(figures, Path(plot_path))
    console.print(f"bits per byte by position in the document: {plot_path}")
    write_figures(json_path, figures)
    console.print(figures["conclusion"])
    return figures
