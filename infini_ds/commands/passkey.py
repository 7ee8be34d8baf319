"""`infini-ds passkey`: tests whether a model finds digits that it read long ago."""

import argparse
import typing

from infini_ds.commands.options import Commands, add_json, integers, with_model, writable
from infini_ds.errors import UserError
from infini_ds.system.arguments import Checked, at_least

_SEGMENTS = [16, 64, 256, 1024, 8192]


def add(commands: Commands) -> None:
    """Adds this command to the parser."""
    parser = with_model(
        commands, "passkey", "test whether a model finds digits that it read long ago", _run
    )  # fmt: skip
    parser.add_argument(
        "--segments",
        action=Checked,
        check=_lengths,
        default=_SEGMENTS,
        help="lengths of documents in segments",
    )
    count = {"type": int, "action": Checked, "check": at_least(1)}
    parser.add_argument(
        "--depths", **count, default=10, help="number of places where the key is hidden"
    )
    parser.add_argument("--samples", **count, help="documents of each length (64; 8 for long ones)")
    parser.add_argument(
        "--filler", action=Checked, check=_filler,
        help="standard, noise or text (the run's data.passkey.filler)",
    )  # fmt: skip
    parser.add_argument(
        "--keys", **count, help="keys in each document (the run's data.passkey.keys)"
    )
    parser.add_argument(
        "--queries", action=Checked, check=_queries,
        help="keys asked for in each document, or all (the run's data.passkey.queries)",
    )  # fmt: skip
    parser.add_argument(
        "--values", **count, help="numbers of each key (the run's data.passkey.values)"
    )
    parser.add_argument(
        "--form", action=Checked, check=_form,
        help="sentence, adjacent or variables (the run's data.passkey.form)",
    )  # fmt: skip
    parser.add_argument("--batch", **count, help="documents read together (8)")
    parser.add_argument(
        "--seed",
        type=int,
        action=Checked,
        check=at_least(0),
        default=0,
        help="seed of the documents",
    )
    add_json(parser)
    parser.add_argument(
        "--plot", action=Checked, check=writable, metavar="FILE",
        help="picture of the heat map (passkey.png, in the run or here)",
    )  # fmt: skip


def _lengths(name: str, text: str) -> list[int]:
    segments = integers(name, text)
    if min(segments) < 2:
        raise UserError(f"{name} ({text}): must each be at least 2")
    return segments


def _queries(name: str, text: str) -> int | str:
    if text != "all" and not (text.isdecimal() and int(text)):
        raise UserError(f"{name} ({text}) must be a number of at least 1, or all")
    return text if text == "all" else int(text)


def _filler(name: str, text: str) -> str:
    return _one_of("filler", name, text)


def _form(name: str, text: str) -> str:
    return _one_of("form", name, text)


def _one_of(setting: str, name: str, text: str) -> str:
    """Checks a text that must be one of those that a setting of data.passkey may have."""
    from infini_ds.config import PasskeyConfig

    known = typing.get_args(PasskeyConfig.model_fields[setting].annotation)
    if text not in known:
        raise UserError(f"{name} ({text}) must be one of {', '.join(known)}")
    return text


def _run(options: argparse.Namespace) -> None:
    from infini_ds.evaluation import passkey

    asked = passkey.PasskeyOptions(
        options.segments, options.depths, options.samples, options.filler, options.keys,
        options.queries, options.values, options.form, options.batch, options.seed,
    )  # fmt: skip
    passkey.run(options.directory, options.step, asked, options.json, options.plot)
