"""Keeps a run's tokenizer beside its weights, so that reading them needs no store.

    OUTPUT_DIR/tokenizer/                            written once, when the run starts
    OUTPUT_DIR/checkpoints/step_00000100/tokenizer/  a copy, so that a checkpoint can go alone

A tokenizer of plain bytes needs no files and has neither directory.
"""

import shutil
from pathlib import Path

from infini_ds.config import TOKENIZER_FILES
from infini_ds.data.tokenizer import load_tokenizer
from infini_ds.data.tokenizer_base import Tokenizer
from infini_ds.errors import UserError
from infini_ds.system.temporary import temporary_beside

FOLDER = "tokenizer"


def keep_tokenizer(tokenizer: Tokenizer, kind: str, run: Path) -> None:
    """Writes the tokenizer into a run's directory, whole or not at all, unless it is there.

    A different tokenizer there was left by a run that ended before its first checkpoint.

    Args:
        kind: its kind, as in data.tokenizer.kind.

    Raises:
        UserError: the directory cannot be written.
    """
    place = run / FOLDER
    if kind == "bytes" or _is_kept(tokenizer, kind, run):
        return
    try:
        with temporary_beside(place) as unfinished:
            tokenizer.save(unfinished)
            if place.exists():
                shutil.rmtree(place)
            unfinished.rename(place)
    except OSError as error:
        raise UserError(f"output_dir {run}: cannot be written ({error.strerror})") from None


def copy_kept_tokenizer(run: Path, checkpoint: Path) -> None:
    """Copies the tokenizer of a run into a checkpoint that is being written, if it has files."""
    if (run / FOLDER).is_dir():
        shutil.copytree(run / FOLDER, checkpoint / FOLDER)


def kept_tokenizer(directory: Path, kind: str) -> Path | None:
    """Returns the tokenizer's file in a run or a checkpoint, if there is one.

    Args:
        kind: its kind, as in data.tokenizer.kind, but not bytes.
    """
    file = directory / FOLDER / TOKENIZER_FILES[kind]
    return file if file.is_file() else None


def _is_kept(tokenizer: Tokenizer, kind: str, run: Path) -> bool:
    file = kept_tokenizer(run, kind)
    try:
        kept = load_tokenizer(kind, file) if file else None
    except UserError:  # it is damaged
        return False
    own = (tokenizer.fingerprint, tokenizer.chat_template)
    return kept is not None and (kept.fingerprint, kept.chat_template) == own
