"""A file or directory that appears only when it is whole."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from infini_ds.errors import UserError


def check_destination(path: Path, source: Path, force: bool) -> None:
    """Whether a destination may be made; arguments and errors are those of `destination`."""
    if path.resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"{path}: must not be the source itself or hold it")
    if path.exists():
        _check_replaceable(path, force)


@contextlib.contextmanager
def destination(path: Path, source: Path, force: bool) -> Iterator[Path]:
    """Where to write: PATH.partial, which becomes `path` if nothing goes wrong.

    Args:
        path: of the file or directory to make; where it leads to, if it is a link.
        source: what is converted, which must not be the same.
        force: whether what is there is replaced, once the new one is whole.

    Raises:
        UserError: the destination exists, or cannot be written.
    """
    check_destination(path, source, force)
    if path.is_symlink():  # a directory cannot be renamed over a link
        path = Path(os.path.realpath(path))
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)  # of a conversion that was killed
        yield partial
        if path.exists():
            _remove(path)
        partial.rename(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            _remove(partial)
        if isinstance(error, OSError):
            where = error.filename or partial
            raise UserError(f"{where}: {error.strerror or error}") from None
        raise


def _check_replaceable(path: Path, force: bool) -> None:
    if not force:
        raise UserError(f"{path}: exists; choose another destination or add --force")
    if path.is_dir():
        # A directory of something else is not deleted by mistake.
        content = list(path.iterdir())
        weights = any(file.suffix == ".safetensors" for file in content)
        if not weights or any(file.is_dir() for file in content):
            raise UserError(f"{path}: is no directory of weights, so it is not replaced; remove it")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
