"""Writes a file or directory that appears only once it is whole."""

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
# Other files of conversions, and what evaluating an export and transformers add.
_BESIDE = re.compile(
    r"(source_|generation_)?config\.(yaml|json)|tokenizer.*|special_tokens_map\.json|vocab\.json"
    r"|added_tokens\.json|merges\.txt|chat_template.*|(configuration|layers|modeling|tokenization)_infini"
    r"\.py|README\.md|(evaluation|passkey|babilong)\.png|tensorboard|__pycache__"
)
_DIRECTORIES = ("tensorboard", "__pycache__")


def check_destination(path: Path, source: Path, force: bool) -> None:
    """Checks that a destination may be made; arguments and errors are those of `destination`."""
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
    """Yields a private place to write to, which becomes `path` if nothing goes wrong.

    Args:
        path: the file (.safetensors) or directory to make; symbolic links are followed.
        source: what is converted, whose files must not be touched.
        force: whether to replace an existing destination, once the new one is whole.

    Raises:
        UserError: the destination exists, or cannot be written.
    """
    check_destination(path, source, force)
    place = Path(os.path.realpath(path))  # a directory cannot be renamed onto a symbolic link
    with _told(path):
        place.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(place) as folder:
            unfinished = folder / place.name
            yield unfinished
            if path.exists():  # another process may have made it meanwhile
                _check_replaceable(path, force)
            if not place.is_dir():
                unfinished.rename(place)
                return
            replaced = folder / "replaced"  # a directory cannot be renamed onto a full one
            place.rename(replaced)
            try:
                unfinished.rename(place)
            except BaseException:
                replaced.rename(place)
                raise


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turns errors of the file system into UserError, since the user can fix them."""
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
        # Never delete anything else by mistake.
        raise UserError(f"{path}: is no directory of weights, so it is not replaced; remove it")


def _is_ours(content: list[Path]) -> bool:
    """Tells whether a directory is empty, or holds weights and only what an export may have."""
    weights = [file for file in content if _WEIGHTS.fullmatch(file.name)]
    others = [file for file in content if file not in weights]
    return not content or (
        bool(weights)
        and all(_BESIDE.fullmatch(file.name) for file in others)
        and all(file.is_dir() == (file.name in _DIRECTORIES) for file in content)
    )
