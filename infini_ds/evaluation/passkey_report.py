"""Reports a pass-key evaluation: figures, table, heat map and TensorBoard scalars."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from infini_ds.evaluation.heat_map import Axis, heat_map, percent
from infini_ds.evaluation.results import Results

_SHARES = ("all", "whole", "cut", "ablated")


class Outcome(NamedTuple):
    """The answers that a model gave to one question."""

    segments: int
    depth: int
    """Index of the part of the text before the questions that held the key."""
    cut: bool
    """Whether a segment ended within the statement of the key."""
    right: bool
    """Whether every digit of the answer was right."""
    right_ablated: bool
    """Whether the answer was right without the memory."""


def figures(outcomes: Sequence[Outcome], depths: int, setup: dict[str, Any]) -> dict[str, Any]:
    """Adds to `setup`, under "lengths", the shares of right answers; None if nothing was asked.

    Each length has "segments" and "samples", the number of answers asked for; the share over "all"
    keys, over "whole" ones, over those "cut" by the end of a segment, and with the memory
    "ablated"; and the share and the number of samples of each depth, "by_depth" and
    "samples_by_depth".
    """
    lengths = []
    for segments in dict.fromkeys(outcome.segments for outcome in outcomes):
        here = [outcome for outcome in outcomes if outcome.segments == segments]
        by_depth = [[one for one in here if one.depth == depth] for depth in range(depths)]
        lengths.append(
            {
                "segments": segments,
                "samples": len(here),
                "all": _share(one.right for one in here),
                "whole": _share(one.right for one in here if not one.cut),
                "cut": _share(one.right for one in here if one.cut),
                "ablated": _share(one.right_ablated for one in here),
                "by_depth": [_share(one.right for one in part) for part in by_depth],
                "samples_by_depth": [len(part) for part in by_depth],
            }
        )
    return {**setup, "lengths": lengths}


def results(figures: dict[str, Any]) -> Results:
    """Returns the figures in every form in which they are reported."""
    scalars = {
        f"passkey/{name}/segments_{length['segments']}": length[name]
        for length in figures["lengths"]
        for name in _SHARES
        if length[name] is not None
    }
    tag = "passkey/by_length_and_depth"
    return Results(figures, _table(figures), _heat_map(figures), tag, scalars)


def _table(figures: dict[str, Any]) -> Table:
    """Builds a table of percentages of right answers: a row per length, a column per depth."""
    result = Table(
        title=f"pass key of {figures['digits']} digits found, percent, by depth of the key\n"
        f"step {figures['step']}, segments of {figures['segment_length']} tokens, "
        f"filler {figures['filler']}, {_keys(figures)}",
        box=SIMPLE_HEAD,
        padding=0,
    )
    names = [*_depth_names(figures["depths"]), *_SHARES, "n"]
    result.add_column("segments", justify="right")
    for name in names:
        result.add_column(name, justify="right")
    for length in figures["lengths"]:
        shares = [*length["by_depth"], *(length[name] for name in _SHARES)]
        result.add_row(f"{length['segments']:,}", *map(percent, shares), f"{length['samples']:,}")
    return result


def _keys(figures: dict[str, Any]) -> str:
    """Describes the keys of a document, naming what is not as it is by default."""
    keys, queries, values = (figures[name] for name in ("keys", "queries", "values"))
    parts = [f"{keys} key{'s' * (keys > 1)}"]
    parts += [f"{queries} asked"] * (queries > 1) + [f"{values} values each"] * (values > 1)
    parts += [f"form {figures['form']}"] * (figures["form"] != "sentence")
    return ", ".join(parts)


def _heat_map(figures: dict[str, Any]) -> Figure:
    lengths = figures["lengths"]
    names = _depth_names(figures["depths"])
    shares = np.array([length["by_depth"] for length in lengths], dtype=float)  # None becomes NaN
    rows = Axis(
        [f"{length['segments']:,}" for length in lengths],
        f"segments of {figures['segment_length']}",
    )
    columns = Axis(names, "depth of the key in what is before the last segment, from")
    return heat_map(shares, rows, columns, f"pass key found, percent, step {figures['step']}")


def _depth_names(depths: int) -> list[str]:
    """Returns a name for each part, which says where it begins."""
    return [f"{100 * depth / depths:.0f}%" for depth in range(depths)]


def _share(rights: Iterable[bool]) -> float | None:
    counted = list(rights)
    return sum(counted) / len(counted) if counted else None
