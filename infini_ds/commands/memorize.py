"""`infini-ds memorize`: reads a document and saves the model's memory of it."""

import argparse
from pathlib import Path

from infini_ds.commands.options import Commands, readable_text, with_model
from infini_ds.errors import UserError
from infini_ds.system.arguments import Checked
from infini_ds.system.paths import argument


def add(commands: Commands) -> None:
    """Adds this command to the parser."""
    about = "read a document and save the model's memory of it"
    parser = with_model(commands, "memorize", about, _run)
    parser.add_argument(
        "document", action=Checked, check=argument, metavar="FILE",
        help="text of any length, plain, .gz or .zst, or - for standard input",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", action=Checked, check=argument, metavar="FILE", required=True,
        help="file to write the memory to, for generate --memory",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def _run(options: argparse.Namespace) -> None:
    output = Path(options.output)
    readable_text("document", options.document)
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: its directory does not exist")
    if output.is_dir() or (output.exists() and not options.force):
        raise UserError(f"--output {output}: exists already; --force replaces a file")
    from infini_ds.generation import memorize

    memorize.run(options.directory, options.step, options.document, options.output)
