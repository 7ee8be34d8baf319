"""`infini-ds status`: shows how a run is doing, from its files alone."""

import argparse

from infini_ds.commands.options import Commands, add_json, command
from infini_ds.system.arguments import Checked
from infini_ds.system.paths import argument


def add(commands: Commands) -> None:
    """Adds this command to the parser."""
    parser = command(commands, "status", "show how a run is doing, from its files alone", _run)
    parser.add_argument(
        "directory", action=Checked, check=argument, metavar="RUN", help="output_dir of a run"
    )
    add_json(parser)


def _run(options: argparse.Namespace) -> None:
    from infini_ds.cluster import status

    status.run(options.directory, options.json)
