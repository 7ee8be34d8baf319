"""`infini-ds inspect`: says what something is, and how it differs from another."""

from pathlib import Path

from infini_ds.inspection.describe import describe
from infini_ds.inspection.difference import difference
from infini_ds.inspection.report import show, show_difference
from infini_ds.system.console import Console
from infini_ds.system.figures import write_figures


def run(path: str, other: str | None, json_path: str | None) -> None:
    """Prints tables, and writes the same figures where they are asked for.

    Args:
        path: a run, a checkpoint, an export, a store or a memory file.
        other: one of the same kind to compare with; what differs is under "difference".

    Raises:
        UserError: a path is none of these, or the two are of different kinds.
    """
    console = Console()
    figures = describe(Path(path))
    found = difference(figures, describe(Path(other))) if other else None
    show(figures, console)
    if found:
        show_difference(found, console)
        figures["difference"] = found
    write_figures(json_path, figures)
