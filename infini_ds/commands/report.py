"""`infini-ds report`: writes one HTML page about a run."""

import argparse
from pathlib import Path

from infini_ds.commands.options import Commands, command, writable
from infini_ds.errors import UserError
from infini_ds.system.arguments import Checked
from infini_ds.system.paths import argument


def add(commands: Commands) -> None:
    """Adds this command to the parser."""
    about = "write one HTML page about a run: curves, gates, evaluations, sample, faults"
    parser = command(commands, "report", about, _run)
    parser.add_argument(
        "directory", action=Checked, check=argument, metavar="RUN", help="output_dir of a run"
    )
    parser.add_argument(
        "-o", "--output", action=Checked, check=writable, metavar="FILE",
        help="the page (report.html in the run)",
    )  # fmt: skip


def _run(options: argparse.Namespace) -> None:
    try:
        import plotly  # noqa: F401
    except ImportError:
        raise UserError("report: needs plotly; `pip install infini-ds[report]`") from None
    from infini_ds.report.figures import collect
    from infini_ds.report.page import write
    from infini_ds.system.console import Console

    directory = Path(options.directory)
    path = Path(options.output) if options.output else directory / "report.html"
    found = collect(directory)
    write(found, directory.resolve().name, path)
    Console().print(f"report: {path}")
