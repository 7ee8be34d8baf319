"""`infini-ds evaluate`: measures a model on documents or on tasks, with and without the memory."""

import argparse
import os

from infini_ds.commands.options import Commands, add_json, distinct, with_model, writable
from infini_ds.commands.questions import COUNT
from infini_ds.errors import UserError
from infini_ds.system.arguments import Checked, at_least
from infini_ds.system.paths import argument

_OF_TASKS = {"task_folder": None, "limit": None, "few_shot": None, "lengths": [4096], "batch": 8}
"""Options that need --tasks, with what they are otherwise."""


def add(commands: Commands) -> None:
    """Adds this command to the parser."""
    about = "measure a model on documents or tasks, with and without the memory"
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
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness, in place of documents")
    tasks.add_argument(
        "--tasks", action=Checked, check=_names, metavar="TASK,...", default=[],
        help="tasks, groups or tags; needs `pip install infini-ds[eval]`",
    )  # fmt: skip
    tasks.add_argument(
        "--task-folder", action=Checked, check=argument, metavar="DIR",
        help="folder with task files of your own",
    )  # fmt: skip
    tasks.add_argument(
        "--limit", **COUNT, metavar="N", help="only so many examples of each task and length"
    )
    tasks.add_argument(
        "--few-shot", type=int, action=Checked, check=at_least(0), metavar="N",
        help="solved examples before each question (what the task says)",
    )  # fmt: skip
    tasks.add_argument(
        "--lengths", action=Checked, check=distinct(1), metavar="N,...",
        help="tokens of the prompts of RULER's tasks (4096)",
    )  # fmt: skip
    tasks.add_argument("--batch", **COUNT, metavar="N", help="examples read together (8)")


def _names(name: str, text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise UserError(f"{name} ({text}) must be names with commas between them")
    return list(dict.fromkeys(names))


def _run(options: argparse.Namespace) -> None:
    if options.tasks:
        _run_tasks(options)
        return
    for name in _OF_TASKS:
        if getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: is for --tasks")
    from infini_ds.evaluation import documents

    documents.run(
        options.directory, options.step, options.documents, options.corpus, options.json,
        options.plot,
    )  # fmt: skip


def _run_tasks(options: argparse.Namespace) -> None:
    for name in ("documents", "corpus", "plot"):
        if getattr(options, name):
            raise UserError(f"--{name}: is for documents; leave out --tasks")
    os.environ.setdefault("TQDM_DISABLE", "1")  # one line of progress is enough, and it is ours
    try:
        import lm_eval  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--tasks: needs lm_eval; `pip install infini-ds[eval]`") from None
    from infini_ds.evaluation import harness

    given = {
        name: default if getattr(options, name) is None else getattr(options, name)
        for name, default in _OF_TASKS.items()
    }
    asked = harness.HarnessOptions(options.tasks, **given)
    harness.run(options.directory, options.step, asked, options.json)
