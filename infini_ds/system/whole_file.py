"""Writes files that appear whole or not at all."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from infini_ds.errors import RunError, UserError
from infini_ds.system.causes import one_line, remedy, shortened

_BLOCK = bytes(4096)


@contextlib.contextmanager
def whole_file(path: str | Path, name: str, kind: type[Exception] = UserError) -> Iterator[Path]:
    """Yields a new file beside `path` that takes its place if nothing goes wrong.

    If `path` exists and is not a regular file, such as /dev/stdout, it is written directly.

    Args:
        name: the user's name for it, for the message.
        kind: class of the error.

    Raises:
        kind: the file cannot be written.
    """
    try:
        if _is_special(path):
            yield Path(path)
            return
        place = Path(os.path.realpath(path))  # a symbolic link stays one
        descriptor, partial = tempfile.mkstemp(
            prefix=f".{place.name}.", suffix=".partial", dir=place.parent
        )
        os.close(descriptor)
        try:
            yield Path(partial)
            os.chmod(partial, 0o666 & ~umask())  # mkstemp gives rights only to the owner
            os.replace(partial, place)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(partial)
    except (UserError, RunError):
        raise
    except Exception as error:  # libraries wrap the system's errors in their own
        if not isinstance(error, OSError) and not remedy(error):
            raise
        raise kind(_unwritable(path, name, error)) from None


def check_writable(path: str | Path, name: str) -> None:
    """Checks that a file can be written, before the work that makes its content.

    Raises:
        UserError: it cannot be written.
    """
    try:
        if not _is_special(path):
            folder = os.path.dirname(os.path.realpath(path))
            with tempfile.TemporaryFile(dir=folder) as trial:
                trial.write(_BLOCK)
                trial.flush()
    except OSError as error:
        raise UserError(_unwritable(path, name, error)) from None


def umask() -> int:
    """Returns the permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _is_special(path: str | Path) -> bool:
    return os.path.exists(path) and not os.path.isfile(path)


def _unwritable(path: str | Path, name: str, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or shortened(one_line(error))
    helps = remedy(error)
    return f"{name} {path}: cannot be written ({reason})" + (f"; {helps}" if helps else "")


def sha256_of(file: Path) -> str:
    """Computes the checksum of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
