"""`infini-ds prepare`: makes the token store of a run."""

import argparse

from infini_ds.commands.options import Commands, load_config, with_config


def add(commands: Commands) -> None:
    """Adds this command to the parser."""
    parser = with_config(commands, "prepare", "make the token store of a run's config", _run)
    parser.add_argument("--force", action="store_true", help="replace an existing store")


def _run(options: argparse.Namespace) -> None:
    config = load_config(options)
    from infini_ds.data.prepare import prepare

    for corpus in config.data.corpora.values():
        prepare(corpus, force=options.force)
