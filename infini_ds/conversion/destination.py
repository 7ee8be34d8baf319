"""A file or directory that appears only when it is whole."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from infini_ds.errors import UserError
from infini_ds.runs.checkpoint import is_run
from infini_ds.system.causes import remedy
from infini_ds.system.temporary import temporary_beside

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
# What else conversions write, and what evaluations of an export and transformers add.
_BESIDE = re.compile(
    r"(source_|generation_)?config\.(yaml|json)|tokenizer.*|special_tokens_map\.json|vocab\.json"
    r"|added_tokens\.json|merges\.txt|chat_template.*|(configuration|modeling|tokenization)_infini"
    r"\.py|README\.md|(evaluation|passkey)\.png|tensorboard|__pycache__"
)
_DIRECTORIES = ("tensorboard", "__pycache__")


def check_destination(path: Path, source: Path, force: bool) -> None:
    """Whether a destination may be made; arguments and errors are those of `destination`."""
    with _told(path):
        resolved, own = path.resolve(), source.resolve()
        files = [own, *(file.resolve() for file in own.iterdir())] if own.is_dir() else [own]
        if any(resolved == file or resolved in file.parents for file in files):
            raise UserError(f"{path}: must not be the source itself or hold it")
        if own in resolved.parents:
            raise UserError(f"{path}: must not lie in the source {source}")
        if any(is_run(parent) for parent in resolved.parents):
            raise UserError(f"{path}: must not lie in a run; choose another destination")
        if path.exists():
            _check_replaceable(path, force)


@contextlib.contextmanager
def destination(path: Path, source: Path, force: bool) -> Iterator[Path]:
    """Where to write: a place of this process alone, which becomes `path` if nothing goes wrong.

    Args:
        path: of the file (.safetensors) or directory to make; where it leads to, if it is a link.
        source: what is converted, whose files must not be touched.
        force: whether what is there is replaced, once the new one is whole.

    Raises:
        UserError: the destination exists, or cannot be written.
    """
    check_destination(path, source, force)
    place = Path(os.path.realpath(path))  # a directory cannot be renamed over a link
    with _told(path):
        place.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(place) as folder:
            unfinished = folder / place.name
            yield unfinished
            if path.exists():  # another process may have made it by now
                _check_replaceable(path, force)
            if not place.is_dir():
                unfinished.rename(place)
                return
            replaced = folder / "replaced"  # a directory cannot be renamed over a full one
            place.rename(replaced)
            try:
                unfinished.rename(place)
            except BaseException:
                replaced.rename(place)
                raise


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What a file system refuses is the user's to mend."""
    try:
        yield
    except OSError as error:
        where = error.filename2 or error.filename or path
        helps = remedy(error)
        why = f"{error.strerror or error}" + (f"; {helps}" if helps else "")
        raise UserError(f"{where}: {why}") from None


def _check_replaceable(path: Path, force: bool) -> None:
    if not force:
        raise UserError(f"{path}: exists; choose another destination or add --force")
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"{path}: is no file, so it is not replaced; remove it")
    elif not path.is_dir() or not _is_ours(list(path.iterdir())):
        # What is something else is not deleted by mistake.
        raise UserError(f"{path}: is no directory of weights, so it is not replaced; remove it")


def _is_ours(content: list[Path]) -> bool:
    """Whether all that is in a directory is what an export may have, its weights among it."""
    weights = [file for file in content if _WEIGHTS.fullmatch(file.name)]
    others = [file for file in content if file not in weights]
    return not content or (
        bool(weights)
        and all(_BESIDE.fullmatch(file.name) for file in others)
        and all(file.is_dir() == (file.name in _DIRECTORIES) for file in content)
    )
