"""`infini-ds config`: prints the settings of a run, or which settings there are."""

import argparse

from infini_ds.commands.options import Commands, load_config, with_config


def add(commands: Commands) -> None:
    """Adds the command to those there are."""
    about = "print all settings of a run, or without one what there are"
    with_config(commands, "config", about, _run, required=False)


def _run(options: argparse.Namespace) -> None:
    from infini_ds import config as configuration

    if options.config is None:
        print(configuration.reference(), end="")
    else:
        print(configuration.dump(load_config(options)), end="")
