"""`infini-ds babilong`: tests whether a model combines facts that it read long ago in real text."""

import argparse
import typing

from infini_ds.commands.options import Commands, with_model
from infini_ds.commands.questions import add_documents, add_filler, add_places
from infini_ds.errors import UserError
from infini_ds.system.arguments import Checked


def add(commands: Commands) -> None:
    """Adds this command to the parser."""
    parser = with_model(
        commands, "babilong", "test whether a model combines facts that it read long ago", _run
    )  # fmt: skip
    parser.add_argument(
        "--tasks", action=Checked, check=_tasks,
        help="qa1, qa2, qa3 (one, two, three facts) and qa8 (lists) (the run's "
        "data.babilong.tasks)",
    )  # fmt: skip
    add_documents(parser, "task and length")
    add_filler(parser, "data.babilong.filler")
    add_places(parser, "babilong.png")


def _tasks(name: str, text: str) -> list[str]:
    from infini_ds.config import BabilongTask

    known = typing.get_args(BabilongTask)
    tasks = text.split(",")
    if not set(tasks) <= set(known):
        raise UserError(f"{name} ({text}) must be of {', '.join(known)}, with commas between them")
    return tasks


def _run(options: argparse.Namespace) -> None:
    from infini_ds.evaluation import babilong

    asked = babilong.BabilongOptions(
        options.tasks, options.segments, options.samples, options.filler, options.batch,
        options.seed,
    )  # fmt: skip
    babilong.run(options.directory, options.step, asked, options.json, options.plot)
