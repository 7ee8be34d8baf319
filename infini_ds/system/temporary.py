"""Directories for what is not finished yet, beside where it will be, and locks on directories."""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from infini_ds.system.whole_file import umask

_SECONDS, _PAUSE = 60.0, 0.05


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A directory beside `path`, removed at the end; those of dead processes are removed first.

    A living process holds a lock on its own.
    """
    with only_one_in(path.parent):  # what another one is just replacing is no leftover
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                _lock(leftover, stack)
                shutil.rmtree(leftover)
    with contextlib.ExitStack() as stack:
        unfinished = _make(path, stack)
        unfinished.chmod(0o777 & ~umask())  # mkdtemp's is for its owner only
        yield unfinished


def _make(path: Path, stack: contextlib.ExitStack) -> Path:
    """A new directory, locked until the stack ends, when it is removed."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        stack.callback(shutil.rmtree, made, ignore_errors=True)
        try:
            _lock(made, stack)
        except BlockingIOError:
            continue  # another that begins takes it for a dead one's
        except OSError:
            pass  # some cluster file systems have no locks; then leftovers stay, and that is all
        if made.exists():
            return made


def _lock(folder: Path, stack: contextlib.ExitStack) -> None:
    """Until the stack ends; OSError if another process has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    stack.callback(os.close, descriptor)


@contextlib.contextmanager
def only_one_in(folder: Path) -> Iterator[None]:
    """Waits until no other process is here, where the file system has locks.

    Raises:
        OSError: another one stays for longer than anything takes that is done here.
    """
    with contextlib.ExitStack() as stack:
        for _ in range(int(_SECONDS / _PAUSE)):
            try:
                _lock(folder, stack)
                break
            except BlockingIOError:
                time.sleep(_PAUSE)
            except OSError:
                break  # no locks
        else:
            raise TimeoutError(errno.ETIMEDOUT, f"another process keeps {folder} locked")
        yield
