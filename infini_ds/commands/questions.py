"""Options of the commands that ask a model about long documents."""

import argparse
import typing
from collections.abc import Sequence
from typing import Any

from infini_ds.commands.options import add_json, integers, writable
from infini_ds.errors import UserError
from infini_ds.system.arguments import Checked, at_least

_SEGMENTS = [16, 64, 256, 1024, 8192]
COUNT: dict[str, Any] = {"type": int, "action": Checked, "check": at_least(1)}
"""Arguments of an option that takes a number of at least 1."""


def add_documents(parser: argparse.ArgumentParser, each: str) -> None:
    """Adds the options that say which documents to make.

    Args:
        each: of which documents --samples is the number.
    """
    parser.add_argument(
        "--segments",
        action=Checked,
        check=_lengths,
        default=_SEGMENTS,
        help="lengths of documents in segments",
    )
    parser.add_argument(
        "--samples", **COUNT, help=f"documents of each {each} (64; 8 for long ones)"
    )
    parser.add_argument("--batch", **COUNT, help="documents read together (8)")
    parser.add_argument(
        "--seed",
        type=int,
        action=Checked,
        check=at_least(0),
        default=0,
        help="seed of the documents",
    )


def add_filler(parser: argparse.ArgumentParser, setting: str) -> None:
    """Adds --filler, which replaces a setting of the run."""
    parser.add_argument(
        "--filler", action=Checked, check=_filler,
        help=f"standard, noise or text (the run's {setting})",
    )  # fmt: skip


def add_places(parser: argparse.ArgumentParser, plot: str) -> None:
    """Adds --json and --plot; `plot` is the name of the picture."""
    add_json(parser)
    parser.add_argument(
        "--plot", action=Checked, check=writable, metavar="FILE",
        help=f"picture of the heat map ({plot}, in the run or here)",
    )  # fmt: skip


def one_of(name: str, text: str, known: Sequence[str]) -> str:
    """Checks that a text is one of those that are known.

    Raises:
        UserError: it is not.
    """
    if text not in known:
        raise UserError(f"{name} ({text}) must be one of {', '.join(known)}")
    return text


def _lengths(name: str, text: str) -> list[int]:
    segments = integers(name, text)
    if min(segments) < 2:
        raise UserError(f"{name} ({text}): must each be at least 2")
    return segments


def _filler(name: str, text: str) -> str:
    from infini_ds.config import FillerKind

    return one_of(name, text, typing.get_args(FillerKind))
