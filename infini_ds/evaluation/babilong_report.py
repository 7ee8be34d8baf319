"""Reports a BABILong evaluation: figures, table, heat map and TensorBoard scalars."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from infini_ds.config import BabilongTask
from infini_ds.data.babilong_world import chance
from infini_ds.evaluation.heat_map import Axis, heat_map, percent
from infini_ds.evaluation.results import Results

_SHARES = ("right", "ablated")


class Outcome(NamedTuple):
    """The answers that a model gave for one document."""

    task: BabilongTask
    segments: int
    right: bool
    """Whether the whole answer was right."""
    right_ablated: bool
    """Whether the answer was right without the memory."""


def figures(outcomes: Sequence[Outcome], setup: dict[str, Any]) -> dict[str, Any]:
    """Adds to `setup`, under "results", the shares of right answers of each task and length.

    Each entry has "task", "segments" and "samples"; the share that is "right", and the one with
    the memory "ablated"; and by "chance" what the best guess without the facts reaches, which
    depends on `setup`'s "answer_steps".
    """
    results = []
    for task, segments in dict.fromkeys((each.task, each.segments) for each in outcomes):
        here = [each for each in outcomes if (each.task, each.segments) == (task, segments)]
        results.append(
            {
                "task": task,
                "segments": segments,
                "samples": len(here),
                "right": sum(each.right for each in here) / len(here),
                "ablated": sum(each.right_ablated for each in here) / len(here),
                "chance": chance(here[0].task, setup["answer_steps"]),
            }
        )
    return {**setup, "results": results}


def results(figures: dict[str, Any]) -> Results:
    """Returns the figures in every form in which they are reported."""
    scalars = {
        f"babilong/{share}/{each['task']}/segments_{each['segments']}": each[share]
        for each in figures["results"]
        for share in _SHARES
    }
    tag = "babilong/by_task_and_length"
    return Results(figures, _table(figures), _heat_map(figures), tag, scalars)


def _table(figures: dict[str, Any]) -> Table:
    """Builds a table of percentages of right answers: a column per length, rows for each task."""
    found, tasks, lengths = _by_place(figures)
    result = Table(
        title="facts found in text, percent, by task and length in segments\n"
        f"step {figures['step']}, segments of {figures['segment_length']} tokens, "
        f"filler {figures['filler']}, up to {figures['facts'][1]} facts",
        box=SIMPLE_HEAD,
        padding=0,
    )
    for name in ("task", "chance", "memory"):
        result.add_column(name)
    for segments in lengths:
        result.add_column(f"{segments:,}", justify="right")
    for task in tasks:
        for share in _SHARES:
            row = [percent(found[task, segments][share]) for segments in lengths]
            guessed = percent(found[task, lengths[0]]["chance"])
            names = (task, guessed, "on") if share == "right" else ("", "", share)
            result.add_row(*names, *row)
    samples = [f"{found[tasks[0], segments]['samples']:,}" for segments in lengths]
    result.add_row("n", "", "", *samples)
    return result


def _heat_map(figures: dict[str, Any]) -> Figure:
    found, tasks, lengths = _by_place(figures)
    shares = np.array([[found[task, segments]["right"] for segments in lengths] for task in tasks])
    columns = Axis(
        [f"{segments:,}" for segments in lengths], f"segments of {figures['segment_length']}"
    )
    title = f"facts found in text, percent, step {figures['step']}"
    return heat_map(shares, Axis(list(tasks), "task"), columns, title)


def _by_place(
    figures: dict[str, Any],
) -> tuple[dict[tuple[BabilongTask, int], dict[str, Any]], list[BabilongTask], list[int]]:
    """Returns the results by task and length, the tasks, and the lengths."""
    found = {(each["task"], each["segments"]): each for each in figures["results"]}
    tasks = list(dict.fromkeys(task for task, _ in found))
    return found, tasks, list(dict.fromkeys(segments for _, segments in found))
