"""Locks an output directory, so that only one run writes to it."""

import fcntl
import time
from pathlib import Path
from typing import IO

from infini_ds.errors import UserError
from infini_ds.system.causes import remedy
from infini_ds.system.whole_file import check_writable

NAME = ".lock"
_LONGEST_WAIT = 100.0
"""Seconds after which a file system drops the lock of a host that is gone."""


def lock(output_dir: Path, limit: float) -> IO | None:
    """Keeps other runs out of a directory until the file is closed or this process ends.

    Args:
        limit: longest wait in seconds for another run, which may be about to end.

    Returns:
        The file to keep open; None on a file system without locks.

    Raises:
        UserError: another run writes there, or the directory is not writable.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = open(output_dir / NAME, "a")  # noqa: SIM115
    except OSError as error:
        helps = f"; {remedy(error)}" if remedy(error) else ""
        raise UserError(
            f"output_dir {output_dir}: cannot be written ({error.strerror}){helps}"
        ) from None
    check_writable(output_dir / NAME, "output_dir")  # even a full disk has room for an empty file
    deadline = time.monotonic() + min(limit, _LONGEST_WAIT)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise UserError(
                    f"output_dir {output_dir}: another run writes there; end it first, or choose "
                    "another output_dir"
                ) from None
            time.sleep(0.2)
        except OSError:
            file.close()
            return None
        else:
            return file
