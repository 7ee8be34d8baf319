"""`infini-ds preflight`: checks that every host is ready for a run."""

import argparse

from infini_ds.commands.options import Commands, add_json, with_config
from infini_ds.system.arguments import Checked
from infini_ds.system.paths import argument


def add(commands: Commands) -> None:
    """Adds this command to the parser."""
    parser = with_config(commands, "preflight", "check that every host is ready for a run", _run)
    parser.add_argument(
        "--hostfile", action=Checked, check=argument, metavar="FILE",
        help="hosts to reach by ssh (this Slurm job's, or this host)",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="print one line if all is good")
    add_json(parser)


def _run(options: argparse.Namespace) -> None:
    from infini_ds.cluster import preflight

    preflight.run(options.config, options.overrides, options.hostfile, options.json, options.quiet)
