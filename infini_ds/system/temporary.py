"""Makes directories for unfinished output beside its final place, and locks directories."""

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
    """Makes a directory beside `path` that is removed at the end.

    Directories left by dead processes are removed first. A living process holds a lock on its own.
    """
    with only_one_in(path.parent):  # another process may be replacing its own just now
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                _lock(leftover, stack)
                shutil.rmtree(leftover)
    with contextlib.ExitStack() as stack:
        unfinished = _make(path, stack)
        unfinished.chmod(0o777 & ~umask())  # mkdtemp gives rights only to the owner
        yield unfinished


def _make(path: Path, stack: contextlib.ExitStack) -> Path:
    """Makes a new directory that is locked, and removed when the stack ends."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        stack.callback(shutil.rmtree, made, ignore_errors=True)
        try:
            _lock(made, stack)
        except BlockingIOError:
            continue  # a process that starts took it for a leftover
        except OSError:
            pass  # some cluster file systems have no locks; there, leftovers merely stay
        if made.exists():
            return made


def _lock(folder: Path, stack: contextlib.ExitStack) -> None:
    """Locks a folder until the stack ends; raises OSError if another process holds the lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    stack.callback(os.close, descriptor)


@contextlib.contextmanager
def only_one_in(folder: Path) -> Iterator[None]:
    """Waits until no other process is in here, if the file system has locks.

    Raises:
        OSError: another process stays longer than any work done here takes.
    """
    with contextlib.ExitStack() as stack:
        for _ in range(int(_SECONDS / _PAUSE)):
            try:
                _lock(folder, stack)
                break
            except BlockingIOError:
                time.sleep(_PAUSE)
            except OSError:
                break  # the file system has no locks
        else:
            raise TimeoutError(errno.ETIMEDOUT, f"another process keeps {folder} locked")
        yield
