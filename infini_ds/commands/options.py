"""Arguments that several commands share."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from infini_ds.errors import UserError
from infini_ds.system.arguments import Checked
from infini_ds.system.paths import argument
from infini_ds.system.whole_file import check_writable

if TYPE_CHECKING:
    from infini_ds.config import RunConfig

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run: TypeAlias = Callable[[argparse.Namespace], None]

MODEL = "an export, a run's output_dir, or one of its checkpoints"
"""The sources from which a command can read a model."""
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def command(commands: Commands, name: str, about: str, run: Run) -> argparse.ArgumentParser:
    """Adds a command whose help starts with what it does."""
    parser = commands.add_parser(name, help=about, description=about)
    parser.set_defaults(run=run)
    return parser


def with_config(
    commands: Commands, name: str, about: str, run: Run, required: bool = True
) -> argparse.ArgumentParser:
    """Adds a command that takes a run's config and settings that override it."""
    parser = command(commands, name, about, run)
    nargs = None if required else "?"
    parser.add_argument(
        "config", nargs=nargs, action=Checked, check=argument, metavar="CONFIG",
        help="YAML file of the run, or the name of one that comes with this (infini-ds configs)",
    )  # fmt: skip
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value",
        help="settings that override the file's",
    )  # fmt: skip
    return parser


def load_config(options: argparse.Namespace, *overrides: str) -> "RunConfig":
    """Loads the config given to a command, with further overrides.

    Raises:
        UserError: a setting or the file is wrong.
    """
    from infini_ds import config as configuration

    return configuration.load(options.config, [*options.overrides, *overrides])


def with_model(commands: Commands, name: str, about: str, run: Run) -> argparse.ArgumentParser:
    """Adds a command that reads a model."""
    parser = command(commands, name, about, run)
    parser.add_argument("directory", action=Checked, check=argument, metavar="MODEL", help=MODEL)
    parser.add_argument(
        "--step", type=int, help="step of the run's checkpoint (the newest valid one)"
    )
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds --json, which every command that prints figures has."""
    parser.add_argument(
        "--json", action=Checked, check=writable, metavar="FILE", help="also write the figures here"
    )


def writable(name: str, text: str) -> str:
    """Checks that a file can be written, before the work that produces its content.

    Raises:
        UserError: it cannot be written, or the name is empty.
    """
    path = argument(name, text)
    if not Path(path).parent.is_dir():
        raise UserError(f"{name} {path}: its directory does not exist")
    if Path(path).is_dir():
        raise UserError(f"{name} {path}: is a directory; name a file")
    check_writable(path, name)
    return path


def readable_text(name: str, text: str) -> str:
    """Checks that a text file exists; it may be a pipe, and - means standard input.

    Raises:
        UserError: there is no such file, or the name is empty.
    """
    from infini_ds.data import text_files

    path = argument(name, text)
    if not text_files.exists(path):
        problem = "is a directory; name a file" if Path(path).is_dir() else "no such file"
        raise UserError(f"{name} {path}: {problem}")
    return path


def integers(name: str, text: str) -> list[int]:
    """Parses integers separated by commas.

    Raises:
        UserError: the text is not such a list.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{text!r}: must be integers with commas between them") from None


def distinct(least: int) -> Callable[[str, str], list[int]]:
    """Returns a check of different integers, each at least `least`."""

    def check(name: str, text: str) -> list[int]:
        values = integers(name, text)
        check_distinct(name, values)
        if min(values) < least:
            raise UserError(f"{name} ({min(values)}) must each be at least {least}")
        return values

    return check


def check_distinct(name: str, values: list) -> None:
    """Checks that no value is named twice.

    Raises:
        UserError: one is.
    """
    if len(set(values)) < len(values):
        raise UserError(f"{name}: each must be named once")


def size(name: str, text: str) -> int:
    """Parses a size such as 500MB or 5GB into bytes.

    Raises:
        UserError: the text is not such a size.
    """
    number, unit = text[:-2], text[-2:].upper()
    if not number.isdecimal() or unit not in _UNITS or int(number) < 1:
        raise UserError(f"{name} ({text}) must be a number with KB, MB or GB, such as 5GB")
    return int(number) * _UNITS[unit]
