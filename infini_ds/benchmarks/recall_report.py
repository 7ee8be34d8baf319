"""Reports recall by variant, number of pairs and distance: figures, table and plot."""

from collections.abc import Iterable
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from infini_ds.system.console import Console
from infini_ds.system.whole_file import whole_file


def summarize(variant: str, state: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarizes a variant over its seeds.

    Args:
        variant: name of the variant, or path of the model.
        state: numbers that a layer keeps of a document.
        runs: the figures of each seed, see `recall_run.run_job`.

    Returns:
        The mean, lowest and highest accuracy of each cell, over the runs; the same with the memory
        ablated, where there is one; and the runs themselves.
    """
    seconds = [run["train_cpu_seconds"] for run in runs if "train_cpu_seconds" in run]
    return {
        "variant": variant,
        "parameters": runs[0]["parameters"],
        "state_numbers_per_layer": state,
        "train_cpu_seconds": _mean(seconds) if seconds else None,
        "cells": _over_runs(run["cells"] for run in runs),
        "ablated": _over_runs(run["ablated"] for run in runs),
        "runs": runs,
    }


def report(figures: dict[str, Any], plot_path: str, console: Console) -> None:
    """Prints the table and writes the plot.

    Raises:
        UserError: the plot cannot be written.
    """
    console.print(table(figures))
    with whole_file(plot_path, "--plot") as file:
        plot(figures).savefig(file, format="png", dpi=150)
    console.print(f"accuracy by pairs and distance: {plot_path}")


def table(figures: dict[str, Any]) -> Table:
    """Makes the table: a row for each variant and number of pairs, a column for each distance."""
    several = len(figures["seeds"]) > 1
    trained = ""
    if "steps" in figures:
        pairs = ", then ".join(map(str, figures["train_pairs"]))
        trained = f" after {figures['steps']:,} steps with {pairs} pairs"
    seeds = f"mean (lowest) of seeds {', '.join(map(str, figures['seeds']))}; " if several else ""
    result = Table(
        title=f"share of right values{trained}, by segments of {figures['segment_length']} between "
        "pairs and questions",
        caption=f"{seeds}{figures['documents']:,} documents a cell, a quarter of them beyond 64 "
        "segments; state: numbers that a layer "
        "keeps of a document; ablated: only the questions are read; guessing gives "
        f"{figures['chance']:.4f}",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    result.add_column("variant", no_wrap=True)
    columns = ["state", "CPU s", "pairs", *(f"{each:,}" for each in figures["distances"])]
    for heading in [*columns, "ablated"]:
        result.add_column(heading, justify="right")
    for one in figures["variants"]:
        seconds = one["train_cpu_seconds"]
        first = [
            one["variant"],
            f"{one['state_numbers_per_layer']:,}",
            "-" if seconds is None else f"{seconds:,.0f}",
        ]
        for pairs in figures["pairs"]:
            cells = [_cell(one["cells"], pairs, each) for each in figures["distances"]]
            cells.append(_cell(one["ablated"], pairs, None))
            result.add_row(*first, str(pairs), *(_shown(cell, several) for cell in cells))
            first = ["", "", ""]
    return result


def plot(figures: dict[str, Any]) -> Figure:
    """Plots accuracy by number of pairs: a panel per distance, a line per variant.

    A band spans the seeds.
    """
    distances = figures["distances"]
    columns = min(3, len(distances))
    rows = -(-len(distances) // columns)
    figure = Figure(figsize=(3.5 * columns + 1, 2.8 * rows + 0.6), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for panel, distance in zip(panels, distances, strict=False):
        for number, one in enumerate(figures["variants"]):
            cells = [cell for cell in one["cells"] if cell["distance"] == distance]
            cells.sort(key=lambda cell: cell["pairs"])
            pairs = [cell["pairs"] for cell in cells]
            label = f"{one['variant']} ({one['state_numbers_per_layer']:,})"
            color = f"C{number % 10}"
            means = [cell["accuracy"] for cell in cells]
            panel.plot(pairs, means, marker="o", color=color, label=label)
            lows, highs = ([cell[end] for cell in cells] for end in ("lowest", "highest"))
            panel.fill_between(pairs, lows, highs, color=color, alpha=0.2)
        panel.set_title(f"{distance:,} segments between", fontsize=10)
        panel.set_xscale("log", base=2)
        panel.set_xticks(figures["pairs"], [str(each) for each in figures["pairs"]])
        panel.set_ylim(-0.03, 1.03)
        panel.grid(alpha=0.3)
    for panel in panels[len(distances) :]:
        panel.set_visible(False)
    figure.supxlabel("pairs", fontsize=10)
    figure.supylabel("share of right values", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, title="numbers a layer keeps in brackets", loc="outside upper center",
        ncols=2, fontsize=8, title_fontsize=8,
    )  # fmt: skip
    return figure


def _over_runs(runs: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Summarizes each cell over the runs, which all have the same cells in the same order."""
    summaries = []
    for cells in zip(*runs, strict=True):
        values = [cell["accuracy"] for cell in cells]
        where = {name: cells[0][name] for name in ("pairs", "distance") if name in cells[0]}
        ends = {"lowest": min(values), "highest": max(values)}
        summaries.append({**where, "accuracy": _mean(values), **ends})
    return summaries


def _cell(cells: list[dict[str, Any]], pairs: int, distance: int | None) -> dict[str, Any] | None:
    found = (one for one in cells if (one["pairs"], one.get("distance")) == (pairs, distance))
    return next(found, None)


def _shown(cell: dict[str, Any] | None, several: bool) -> str:
    if cell is None:
        return "-"
    lowest = f" ({cell['lowest']:.3f})" if several else ""
    return f"{cell['accuracy']:.3f}{lowest}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
