"""Draws shares of right answers as a map of colours with percentages in it."""

from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure


class Axis(NamedTuple):
    """One side of a map."""

    names: list[str]
    """The names of its rows or columns."""
    label: str


_LIGHT = (0.299, 0.587, 0.114)
"""How light red, green and blue look."""
_MOST_NUMBERS = 256
"""Of a larger map, only the colours can be told apart."""


def heat_map(
    shares: np.ndarray, rows: Axis, columns: Axis, title: str, colors: str = "RdYlGn"
) -> Figure:
    """Draws shares from 0 to 1, [rows, columns]; where nothing was asked, NaN leaves it white.

    Args:
        colors: one of matplotlib's colour maps.
    """
    numbers = shares.size <= _MOST_NUMBERS
    if numbers:
        width, height = 2 + 0.6 * len(columns.names), 1.8 + 0.5 * len(rows.names)
    else:  # no larger than needed, for TensorBoard shows it small, its letters too
        width, height = (max(4, 2 + 0.05 * len(side.names)) for side in (columns, rows))
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap=colors, vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if numbers and not np.isnan(share):
            light = np.dot(image.to_rgba(share)[:3], _LIGHT) > 0.5
            color = "black" if light else "white"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=color)
    every = 1 if numbers else 8
    axes.set_xticks(range(0, len(columns.names), every), columns.names[::every], fontsize=7)
    axes.set_yticks(range(0, len(rows.names), every), rows.names[::every])
    axes.set_xlabel(columns.label)
    axes.set_ylabel(rows.label)
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes)
    return figure


def percent(share: float | None) -> str:
    """Writes a share for a table; - if nothing was asked."""
    return "-" if share is None else f"{100 * share:.0f}"
