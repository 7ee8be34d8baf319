"""`infini-ds inspect`: describes a path, and how it differs from another one."""

import argparse
from pathlib import Path

from infini_ds.commands.options import Commands, add_json, command
from infini_ds.errors import UserError
from infini_ds.system.arguments import Checked
from infini_ds.system.paths import argument


def add(commands: Commands) -> None:
    """Adds this command to the parser."""
    about = "describe a run, checkpoint, export, store or memory file, and check it for damage"
    parser = command(commands, "inspect", about, _run)
    parser.add_argument("path", action=Checked, check=argument, metavar="PATH", help="one of these")
    parser.add_argument(
        "--diff", action=Checked, check=argument, metavar="OTHER",
        help="show how another one differs from it",
    )  # fmt: skip
    add_json(parser)


def _run(options: argparse.Namespace) -> None:
    for path in filter(None, (options.path, options.diff)):
        if not Path(path).exists():
            raise UserError(f"inspect {path}: no such file or directory")
    from infini_ds.inspection.describe import describe
    from infini_ds.inspection.difference import difference
    from infini_ds.inspection.report import show, show_difference
    from infini_ds.system.console import Console
    from infini_ds.system.figures import write_figures

    console = Console()
    figures = describe(Path(options.path))
    found = difference(figures, describe(Path(options.diff))) if options.diff else None
    show(figures, console)
    if found:
        show_difference(found, console)
        figures["difference"] = found
    write_figures(options.json, figures)
