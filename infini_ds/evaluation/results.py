"""Writes the results of an evaluation to places that are checked before anything is measured."""

from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.table import Table
from torch.utils.tensorboard.writer import SummaryWriter

from infini_ds.errors import UserError
from infini_ds.runs.checkpoint import Loaded
from infini_ds.system.causes import cause, one_line
from infini_ds.system.console import Console, leave_to_the_caller
from infini_ds.system.figures import write_figures
from infini_ds.system.whole_file import check_writable, whole_file


class Places(NamedTuple):
    """Files to which one evaluation writes."""

    json: str | None
    plot: Path
    tensorboard: Path | None


class Results(NamedTuple):
    """The results of an evaluation in every form in which they are reported."""

    figures: dict[str, Any]
    """They include "step"."""
    table: Table
    plot: Figure
    plot_tag: str
    """Name of the plot in TensorBoard."""
    scalars: dict[str, float]
    """Figures by their names in TensorBoard."""


def places(
    loaded: Loaded, command: str, plot_name: str, json: str | None, plot: str | None
) -> Places:
    """Returns where the results of a command go, after checking that they can be written.

    Nothing is written into an export, because it is meant to be given away, or into a checkpoint
    that was taken out of its run. If the run's directory cannot be written, because it belongs to
    somebody else, its TensorBoard is left out.

    Args:
        plot_name: name of the plot's file, in the run's directory or else in the working directory;
            used if `plot` names no other file.

    Raises:
        UserError: a file cannot be written.
    """
    is_export = loaded.directory in (loaded.checkpoint, loaded.checkpoint.parent)
    picture = Path(plot or (plot_name if is_export else loaded.directory / plot_name))
    check_writable(picture, "--plot")
    return Places(json, picture, None if is_export else _board(loaded.directory, command))


def write(results: Results, places: Places, console: Console) -> None:
    """Prints and writes results, beginning with those whose loss would hurt most.

    Raises:
        RunError: the table cannot be printed.
        UserError: a file cannot be written.
    """
    try:
        console.print(results.table)
    finally:
        write_figures(places.json, results.figures)
    with whole_file(places.plot, "--plot") as file:
        results.plot.savefig(file, format="png", dpi=150)
    console.print(f"plot: {places.plot}")
    if places.tensorboard is None:
        return
    step = results.figures["step"]
    leave_to_the_caller()
    try:
        board = SummaryWriter(str(places.tensorboard))
        board.add_figure(results.plot_tag, results.plot, step, close=False)
        for name, value in results.scalars.items():
            board.add_scalar(name, value, step)
        board.close()
    except OSError as error:
        why = cause(error) or one_line(error)
        raise UserError(f"TensorBoard {places.tensorboard}: cannot be written ({why})") from None


def _board(directory: Path, command: str) -> Path | None:
    board = directory / "tensorboard" / command
    try:
        board.mkdir(parents=True, exist_ok=True)
        check_writable(board / "events", "TensorBoard")
    except (OSError, UserError):
        return None
    return board
