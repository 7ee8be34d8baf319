"""`infini-ds config`: prints a run's settings, or lists all settings that exist."""

import argparse

from infini_ds.commands.options import Commands, load_config, with_config
from infini_ds.errors import UserError


def add(commands: Commands) -> None:
    """Adds this command to the parser."""
    about = "print all settings of a run, or without CONFIG all settings that exist"
    parser = with_config(commands, "config", about, _run, required=False)
    parser.add_argument("--schema", action="store_true", help="print a JSON schema for editors")


def _run(options: argparse.Namespace) -> None:
    from infini_ds import config as configuration

    if options.schema and options.config is not None:
        raise UserError("--schema: describes all settings; leave out CONFIG")
    if options.schema:
        print(configuration.schema(), end="")
    elif options.config is None:
        print(configuration.reference(), end="")
    else:
        print(configuration.dump(load_config(options)), end="")
