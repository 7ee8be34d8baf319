"""`infini-ds passkey`: tests whether a model finds digits that it read long ago."""

import argparse
import typing

from infini_ds.commands.options import Commands, with_model
from infini_ds.commands.questions import COUNT, add_documents, add_filler, add_places, one_of
from infini_ds.errors import UserError
from infini_ds.system.arguments import Checked


def add(commands: Commands) -> None:
    """Adds this command to the parser."""
    parser = with_model(
        commands, "passkey", "test whether a model finds digits that it read long ago", _run
    )  # fmt: skip
    add_documents(parser, "length")
    parser.add_argument(
        "--depths", **COUNT, default=10, help="number of places where the key is hidden"
    )
    add_filler(parser, "data.passkey.filler")
    parser.add_argument(
        "--keys", **COUNT, help="keys in each document (the run's data.passkey.keys)"
    )
    parser.add_argument(
        "--queries", action=Checked, check=_queries,
        help="keys asked for in each document, or all (the run's data.passkey.queries)",
    )  # fmt: skip
    parser.add_argument(
        "--values", **COUNT, help="numbers of each key (the run's data.passkey.values)"
    )
    parser.add_argument(
        "--form", action=Checked, check=_form,
        help="sentence, adjacent or variables (the run's data.passkey.form)",
    )  # fmt: skip
    add_places(parser, "passkey.png")


def _queries(name: str, text: str) -> int | str:
    if text != "all" and not (text.isdecimal() and int(text)):
        raise UserError(f"{name} ({text}) must be a number of at least 1, or all")
    return text if text == "all" else int(text)


def _form(name: str, text: str) -> str:
    from infini_ds.config import PasskeyConfig

    return one_of(name, text, typing.get_args(PasskeyConfig.model_fields["form"].annotation))


def _run(options: argparse.Namespace) -> None:
    from infini_ds.evaluation import passkey

    asked = passkey.PasskeyOptions(
        options.segments, options.depths, options.samples, options.filler, options.keys,
        options.queries, options.values, options.form, options.batch, options.seed,
    )  # fmt: skip
    passkey.run(options.directory, options.step, asked, options.json, options.plot)
