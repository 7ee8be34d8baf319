"""Reports what a model reaches in tasks of lm-evaluation-harness: figures and a table."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

_NOT_ASKED = -1
"""What RULER's tasks give for lengths that were not asked."""
LENGTH = "max_length"
"""What RULER's examples call their length, whose number is also the name of a measure."""


class Figure(NamedTuple):
    """One measure of one task."""

    task: str
    metric: str
    value: float
    stderr: float | None


def figures_of(results: dict[str, Any]) -> Iterator[Figure]:
    """Yields the measures of the harness's results."""
    for task, measures in results["results"].items():
        for key, value in measures.items():
            metric, _, variant = key.partition(",")
            if not variant or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            if value == _NOT_ASKED:
                continue
            stderr = measures.get(f"{metric}_stderr,{variant}")
            name = metric if variant == "none" else f"{metric} ({variant})"
            yield Figure(task, name, value, stderr if isinstance(stderr, int | float) else None)


def figures(found: dict[str, dict[str, Any]], setup: dict[str, Any]) -> dict[str, Any]:
    """Puts together what was found with the memory on and ablated.

    Args:
        found: the harness's results, under "with_memory" and "ablated".
        setup: what else is to be known of the evaluation.
    """
    ablated = {(each.task, each.metric): each for each in figures_of(found["ablated"])}
    rows = []
    for each in figures_of(found["with_memory"]):
        other = ablated.get((each.task, each.metric))
        rows.append(
            {
                "task": each.task,
                "metric": each.metric,
                "examples": _examples(found["with_memory"], each),
                "with_memory": each.value,
                "stderr": each.stderr,
                "ablated": other.value if other else None,
                "ablated_stderr": other.stderr if other else None,
            }
        )
    return {**setup, "results": rows}


def _examples(results: dict[str, Any], figure: Figure) -> int | None:
    """Counts the examples of a measure; None for groups of tasks."""
    documents = [sample["doc"] for sample in results.get("samples", {}).get(figure.task, ())]
    lengths = [str(each[LENGTH]) for each in documents if LENGTH in each]
    if lengths:
        return lengths.count(figure.metric)
    return results["n-samples"].get(figure.task, {}).get("effective")


def table(figures: dict[str, Any]) -> Table:
    """Builds a table with a row for each measure."""
    errors = any(row["stderr"] is not None for row in figures["results"])
    result = Table(
        title=f"lm-evaluation-harness {figures['harness']}, step {figures['step']:,}, segments of "
        f"{figures['segment_length']:,}",
        caption=("in brackets the standard error; " if errors else "")
        + "ablated: no token reads the memory",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    for heading in ("task", "measure"):
        result.add_column(heading)
    for heading in ("examples", "with memory", "ablated"):
        result.add_column(heading, justify="right")
    for row in figures["results"]:
        result.add_row(
            row["task"],
            row["metric"],
            "-" if row["examples"] is None else f"{row['examples']:,}",
            _cell(row["with_memory"], row["stderr"]),
            _cell(row["ablated"], row["ablated_stderr"]),
        )
    return result


def _cell(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" ({stderr:.4f})" if stderr is not None else "")
