"""Draws shares of right answers as a map of colours with percentages in it."""

from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure


class Axis(NamedTuple):
    """One side of a map."""

    names: list[str]
    """The names of its rows or columns."""
    label: str


def heat_map(shares: np.ndarray, rows: Axis, columns: Axis, title: str) -> Figure:
    """Draws shares from 0 to 1, [rows, columns]; where nothing was asked, NaN leaves it white."""
    size = (2 + 0.6 * len(columns.names), 1.8 + 0.5 * len(rows.names))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if not np.isnan(share):
            color = "black" if 0.2 < share < 0.8 else "white"  # readable on the map's dark ends
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(columns.names)), columns.names, fontsize=7)
    axes.set_yticks(range(len(rows.names)), rows.names)
    axes.set_xlabel(columns.label)
    axes.set_ylabel(rows.label)
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes)
    return figure


def percent(share: float | None) -> str:
    """Writes a share for a table; - if nothing was asked."""
    return "-" if share is None else f"{100 * share:.0f}"
