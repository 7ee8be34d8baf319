"""Holds the options of a conversion, and handles the tokenizer that goes with the model."""

from dataclasses import dataclass
from pathlib import Path

from infini_ds.config import TOKENIZER_FILES, ExportConfig, ModelConfig
from infini_ds.data.tokenizer import load_tokenizer
from infini_ds.data.tokenizer_base import Tokenizer
from infini_ds.errors import UserError
from infini_ds.runs.checkpoint import tokenizer_of
from infini_ds.runs.export import Model, copy_tokenizer, export_tokenizer, tokenizer_files
from infini_ds.system.console import Console


@dataclass(frozen=True)
class Task:
    """The options that all conversions share."""

    source: Path
    target: Path
    force: bool = False
    """Whether to replace an existing target."""
    shard_bytes: int = 5_000_000_000
    """Largest file of a directory, unless a single tensor is larger; 0 writes one file."""
    without_tokenizer: bool = False
    """Whether to make a directory even if there is no tokenizer that we can read."""


def tokenizer_for(model: Model, task: Task, console: Console) -> Tokenizer | None:
    """Loads the tokenizer of a model; returns None if only transformers may be able to read it.

    Raises:
        UserError: it has none or one that we cannot read, and the task needs one.
    """
    try:
        if not isinstance(model.settings, ExportConfig):
            assert model.checkpoint is not None
            return tokenizer_of(model.checkpoint, model.settings)
        tokenizer = export_tokenizer(model.settings)
        if tokenizer or (task.source.is_dir() and tokenizer_files(task.source)):
            return tokenizer
        reason = f"{task.source}: has no tokenizer; put its tokenizer.json or tokenizer.model there"
        if task.source.is_file():
            reason = (
                f"{task.source}: a single file carries no tokenizer; name what it was made from"
            )
    except UserError as error:
        reason = str(error)
    _accept_none(reason, task, console)
    return None


def _accept_none(reason: str, task: Task, console: Console) -> None:
    """Refuses an export without a tokenizer, which is of little use, unless it is asked for."""
    if not task.without_tokenizer:
        raise UserError(f"{reason}, or add --without-tokenizer")
    warn(console, f"made without a tokenizer that can be read: {reason}")


def write_tokenizer(
    model: Model, tokenizer: Tokenizer | None, source: Path, directory: Path
) -> None:
    """Writes a model's tokenizer files into an export, including those that only others read."""
    if model.checkpoint is None and source.is_dir():
        copy_tokenizer(source, directory)
    elif tokenizer:
        tokenizer.save(directory)


def kind_of_tokenizer(
    source: Path, config: ModelConfig, task: Task, console: Console
) -> str | None:
    """Returns the kind of a plain model's tokenizer; None if it has none that we can read.

    A tokenizer.json takes precedence, because transformers uses it.

    Raises:
        UserError: there is none, and the task needs one.
    """
    reason = f"{task.source}: has neither tokenizer.json nor tokenizer.model; put one there"
    for kind in ("tokenizers", "sentencepiece"):
        file = source / TOKENIZER_FILES[kind]
        if not file.is_file():
            continue
        try:
            tokenizer = load_tokenizer(kind, file)
        except UserError as error:
            reason = str(error)
            continue
        if tokenizer.vocab_size <= config.vocab_size:
            return kind
        reason = (
            f"{file} has {tokenizer.vocab_size} tokens, the model {config.vocab_size}; it must be "
            "the model's own"
        )
    _accept_none(reason, task, console)
    return None


def warn(console: Console, text: str) -> None:
    """Warns of something that the user may not have intended."""
    console.print(f"warning: {text}")
