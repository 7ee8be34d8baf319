"""Reports a comparison of variants: figures, table, plot and conclusion."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from infini_ds.benchmarks.quality_variants import VARIANTS
from infini_ds.system.whole_file import whole_file


def summarize(variant: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarizes a variant over its seeds, in bits per byte.

    Args:
        variant: name of the variant.
        runs: the figures of each seed, see `quality_run.run_job`.

    Returns:
        The mean and the spread (largest minus smallest) with the memory on; both with the memory
        ablated and the gain of the memory, which are None for a variant without memory; and the
        runs themselves.
    """
    on = [run["held_out"]["bits_per_byte"] for run in runs]
    ablated = [run["ablated"]["bits_per_byte"] for run in runs if "ablated" in run]
    return {
        "variant": variant,
        "memory": VARIANTS[variant].memory,
        "parameters": runs[0]["parameters"],
        "train_positions": runs[0]["train_positions"],
        "train_tokens": _mean([run["train_tokens"] for run in runs]),
        "bits_per_byte": _mean(on),
        "spread": max(on) - min(on),
        "ablated_bits_per_byte": _mean(ablated) if ablated else None,
        "ablated_spread": max(ablated) - min(ablated) if ablated else None,
        "ablation_gain": _mean(ablated) - _mean(on) if ablated else None,
        "runs": runs,
    }


def conclusion(variants: list[dict[str, Any]], seeds: int) -> str:
    """Says which memories beat `segments-only` and their own ablation by more than the spread."""
    segments_only = next((one for one in variants if one["variant"] == "segments-only"), None)
    memories = [one for one in variants if one["memory"]]
    if segments_only is None or not memories:
        return "Judging the memory takes segments-only and a variant with memory."
    better = [one["variant"] for one in memories if _beats(one, segments_only)]
    others = [one["variant"] for one in memories if one["variant"] not in better]
    measure = "more than the seeds' spread" if seeds > 1 else "any amount (one seed has no spread)"
    sentence = f"Memory beats both segments-only and its own ablation by {measure} in "
    if not better:
        return f"{sentence}none of {', '.join(others)}."
    sentence += ", ".join(better)
    return f"{sentence}, not in {', '.join(others)}." if others else f"{sentence}."


def _beats(memory: dict[str, Any], segments_only: dict[str, Any]) -> bool:
    gain = segments_only["bits_per_byte"] - memory["bits_per_byte"]
    return (
        gain > max(memory["spread"], segments_only["spread"])
        and memory["ablation_gain"] > max(memory["spread"], memory["ablated_spread"])
    )  # fmt: skip


def table(figures: dict[str, Any]) -> Table:
    """Builds a table with a row for each variant."""
    result = Table(
        title=f"held-out text, {figures['held_out_tokens']:,} tokens in {figures['documents']:,} "
        f"documents, after {figures['steps']:,} steps of {figures['batch_size']} x "
        f"{figures['window_length']:,} positions in segments of {figures['segment_length']:,}",
        caption=f"means over seeds {', '.join(map(str, figures['seeds']))}; spread: largest less "
        "smallest; ablated: no token reads the memory; gain: extra bits per byte then; "
        "train tokens: positions without padding",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    result.add_column("variant", no_wrap=True)
    for heading in (
        "parameters", "train tokens", "bits/byte", "spread", "ablated", "spread", "gain"
    ):  # fmt: skip
        result.add_column(heading, justify="right")
    for one in figures["variants"]:
        names = ("bits_per_byte", "spread", "ablated_bits_per_byte", "ablated_spread")
        result.add_row(
            one["variant"],
            f"{one['parameters']:,}",
            f"{one['train_tokens']:,.0f}",
            *map(_bits, (*(one[name] for name in names), one["ablation_gain"])),
        )
    return result


def kinds_table(figures: dict[str, Any]) -> Table:
    """Builds a table of bits per byte by kind of token, and of the memory's gain there."""
    result = Table(
        title="bits per byte by kind of token; in brackets the gain over the ablated memory",
        caption=f"recalled: ends a rare pair of tokens that stood more than "
        f"{figures['segment_length']:,} tokens before; near: at most so many",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    result.add_column("variant", no_wrap=True)
    first = figures["variants"][0]["runs"][0]["held_out"]["by_kind"]
    total = sum(one["tokens"] for one in first.values())
    for kind, one in first.items():
        result.add_column(f"{kind} ({one['tokens'] / total:.1%})", justify="right")
    for one in figures["variants"]:
        result.add_row(one["variant"], *(_of_kind(one["runs"], kind) for kind in first))
    return result


def _of_kind(runs: list[dict[str, Any]], kind: str) -> str:
    means = {
        name: _mean([run[name]["by_kind"][kind]["bits_per_byte"] for run in runs])
        for name in ("held_out", "ablated")
        if name in runs[0] and runs[0][name]["by_kind"][kind]["bits_per_byte"] is not None
    }
    shown = _bits(means.get("held_out"))
    if "ablated" in means:
        shown += f" ({means['ablated'] - means['held_out']:+.4f})"
    return shown


def write_plot(figures: dict[str, Any], path: Path) -> None:
    """Plots bits per byte by position in the document: a line per variant, a band for its seeds."""
    begins = figures["bins"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for one in figures["variants"]:
        # [bins][seeds]; a bin whose tokens stand for no text has no value.
        columns = zip(*(_by_position(run) for run in one["runs"]), strict=True)
        points = [(place, values) for place, values in enumerate(columns) if None not in values]
        places = [place for place, _ in points]
        (line,) = axes.plot(
            places, [_mean(values) for _, values in points], marker="o", label=one["variant"]
        )
        lows = [min(values) for _, values in points]
        highs = [max(values) for _, values in points]
        axes.fill_between(places, lows, highs, color=line.get_color(), alpha=0.2)
    names = [f"{begin:,}" for begin in begins]
    axes.set_xticks(range(len(begins)), names, fontsize=8)
    axes.set_xlabel("position in the document, tokens, from")
    axes.set_ylabel("bits per byte")
    axes.set_title(
        f"held-out text after {figures['steps']:,} steps, segments of "
        f"{figures['segment_length']}, windows of {figures['window_length']:,}",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    axes.legend()
    with whole_file(path, "--plot") as file:
        figure.savefig(file, format="png", dpi=150)


def _by_position(run: dict[str, Any]) -> list[float | None]:
    return [part["bits_per_byte"] for part in run["held_out"]["by_position"]]


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _mean(values: Iterable[float]) -> float:
    counted = list(values)
    return sum(counted) / len(counted)
