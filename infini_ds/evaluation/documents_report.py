"""Reports an evaluation on documents: figures, table, curve and TensorBoard scalars."""

import math
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from infini_ds.evaluation.results import Results

NAMES = ("with_memory", "ablated")


def figures(setup: dict[str, Any], results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Adds to `setup`, under each of NAMES, the result of `by_position.means` and "perplexity"."""
    return {
        **setup,
        **{
            name: {"perplexity": math.exp(min(result["loss"], 700)), **result}
            for name, result in results.items()
        },
    }


def results(figures: dict[str, Any]) -> Results:
    """Returns the figures in every form in which they are reported."""
    scalars = {}
    for name in NAMES:
        result = figures[name]
        for measure in ("loss", "perplexity", "bits_per_byte"):
            scalars[f"evaluate/{name}/{measure}"] = result[measure]
        for begin, part in zip(figures["bins"], result["by_position"], strict=True):
            tag = f"evaluate/{name}/bits_per_byte_from/position_{begin}"
            scalars[tag] = part["bits_per_byte"]
    known = {name: value for name, value in scalars.items() if value is not None}
    return Results(figures, _table(figures), _curve(figures), "evaluate/by_position", known)


def _table(figures: dict[str, Any]) -> Table:
    """Builds a table with a row for each bin of positions and one for all tokens."""
    on, ablated = (figures[name] for name in NAMES)
    result = Table(
        title=f"{on['tokens']:,} tokens in {figures['documents']:,} documents, step "
        f"{figures['step']:,}, segments of {figures['segment_length']:,}\n"
        f"perplexity {on['perplexity']:.4f} with memory, {ablated['perplexity']:.4f} ablated",
        caption="ablated: no token reads the memory; gain: extra bits per byte then",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    headings = ("position from", "tokens", "loss", "ablated", "bits/byte", "ablated", "gain")
    for heading in headings:
        result.add_column(heading, justify="right")
    parts = zip(figures["bins"], on["by_position"], ablated["by_position"], strict=True)
    for begin, one, other in parts:
        result.add_row(f"{begin:,}", *_cells(one, other))
    result.add_row("all", *_cells(on, ablated), style="bold")
    return result


def _curve(figures: dict[str, Any]) -> Figure:
    """Plots bits per byte by position in the document."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name in NAMES:
        bits = [part["bits_per_byte"] for part in figures[name]["by_position"]]
        points = [(place, value) for place, value in enumerate(bits) if value is not None]
        places, values = zip(*points, strict=True) if points else ((), ())
        axes.plot(places, values, marker="o", label=name.replace("_", " "))
    axes.set_xticks(
        range(len(figures["bins"])), [f"{begin:,}" for begin in figures["bins"]], fontsize=8
    )
    axes.set_xlabel("position in the document, tokens, from")
    axes.set_ylabel("bits per byte")
    axes.set_title(
        f"{figures['documents']:,} documents, step {figures['step']:,}, segments of "
        f"{figures['segment_length']:,}",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _cells(on: dict[str, Any], ablated: dict[str, Any]) -> list[str]:
    bits, without = on["bits_per_byte"], ablated["bits_per_byte"]
    gain = None if bits is None or without is None else without - bits
    numbers = (on["loss"], ablated["loss"], bits, without, gain)
    return [f"{on['tokens']:,}", *("-" if x is None else f"{x:.4f}" for x in numbers)]
