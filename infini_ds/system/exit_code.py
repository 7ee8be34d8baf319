"""Ends our programs: one line says what went wrong, and the exit code whose fault it is."""

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable

from infini_ds.errors import RunError, UserError
from infini_ds.system import environment
from infini_ds.system.causes import cause, variable

_HEAD_START_SECONDS = 5.0
"""Other ranks wait this long before they print, so that rank 0's message comes first."""
_UNREAD = 128 + 13
"""Exit code of a program that was ended by SIGPIPE."""


def exit_code(command: Callable[[], None]) -> int:
    """Runs a command and turns its errors into one line and an exit code.

    Errors of the system, such as a full disk, come with a remedy, see `cause`. The code is 0 on
    success, 1 if a run could not go on, 2 for the user's mistakes and 130 after Ctrl-C. If nobody
    reads the output any more it is 141, as after SIGPIPE, without a line.
    """
    environment.open_streams()
    try:
        try:
            command()
        finally:
            print(end="", flush=True)  # flush while errors can still be reported
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            # Rank 0 usually says the same, and when it exits, the launcher ends the others.
            time.sleep(_HEAD_START_SECONDS)
        return fail(error, 2)
    except RunError as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except SystemExit as ended:
        if not isinstance(ended.__context__, BrokenPipeError):
            raise
        return _UNREAD  # rich has ended the program itself
    except OSError as error:
        unread = isinstance(error, BrokenPipeError) and _output_is_unread()
        told = cause(error)
        if not told and not unread:
            raise
        if error.errno and error.filename is None:  # a failed write, usually to standard output
            # Python would retry the unwritten rest at its exit, and fail with a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            told = f"cannot write ({error.strerror})"
        return _UNREAD if unread else fail(told, 1)
    except (MemoryError, RuntimeError, ImportError, ValueError) as error:
        if told := cause(error):
            return fail(told, 1)
        if told := variable(error):
            return fail(told, 2)
        raise
    return 0


def _output_is_unread() -> bool:
    """Tells whether it was standard output's pipe that nobody reads; other pipes break too."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))


def fail(error: UserError | RunError | str, code: int) -> int:
    """Prints on standard error in one line what failed, and on which rank; returns the code."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    where = f" rank {rank}" if rank != "0" or (code == 1 and world != "1") else ""
    with contextlib.suppress(OSError):  # the terminal may have been closed
        print(f"infini-ds{where}: {error}", file=sys.stderr, flush=True)
    return code
