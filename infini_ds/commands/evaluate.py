"""`infini-ds evaluate`: measures the loss of documents by position, with and without the memory."""

import argparse

from infini_ds.commands.options import Commands, add_json, with_model, writable
from infini_ds.system.arguments import Checked
from infini_ds.system.paths import argument


def add(commands: Commands) -> None:
    """Adds this command to the parser."""
    about = "measure the loss of documents by position, with and without the memory"
    parser = with_model(commands, "evaluate", about, _run)
    parser.add_argument(
        "--documents", action=Checked, check=argument, metavar="FILE", nargs="+", default=[],
        help="files or globs as in data.files, or - for one on standard input (the run's held-out "
        "documents)",
    )  # fmt: skip
    parser.add_argument(
        "--corpus",
        metavar="NAME",
        default="",
        help="corpus of a mixture whose held-out documents to use",
    )
    add_json(parser)
    parser.add_argument(
        "--plot", action=Checked, check=writable, metavar="FILE",
        help="picture of the curve (evaluation.png, in the run or here)",
    )  # fmt: skip


def _run(options: argparse.Namespace) -> None:
    from infini_ds.evaluation import documents

    documents.run(
        options.directory, options.step, options.documents, options.corpus, options.json,
        options.plot,
    )  # fmt: skip
