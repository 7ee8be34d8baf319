"""How a program of ours ends: one line of what went wrong, and a code that says whose it is."""

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
"""Exit code of a program that SIGPIPE has ended."""


def exit_code(command: Callable[[], None]) -> int:
    """Runs something and turns its errors into one line and a code.

    Errors of the system, such as a full disk, are told with what helps, see `cause`. The code is 0,
    1 if a run could not go on, 2 for the user's mistakes, 130 after Ctrl-C, and 141, as of a
    program that SIGPIPE has ended, without a line, when nobody reads the output any more.
    """
    environment.open_streams()
    try:
        try:
            command()
        finally:
            print(end="", flush=True)  # here, and not after the last line that could tell
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            # Rank 0 most often says the same, and when it leaves, the launcher ends the others.
            time.sleep(_HEAD_START_SECONDS)
        return fail(error, 2)
    except RunError as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except SystemExit as ended:
        if not isinstance(ended.__context__, BrokenPipeError):
            raise
        return _UNREAD  # rich ends the program itself
    except OSError as error:
        unread = isinstance(error, BrokenPipeError) and _output_is_unread()
        told = cause(error)
        if not told and not unread:
            raise
        if error.errno and error.filename is None:  # of a write, most often to standard output
            # What was not written would be tried again, and fail with a traceback, at the very end.
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
    """The pipe that standard output goes into has no other end; there are more pipes than that."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))


def fail(error: UserError | RunError | str, code: int) -> int:
    """Says in one line on standard error what went wrong, and on which rank; the code."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    where = f" rank {rank}" if rank != "0" or (code == 1 and world != "1") else ""
    with contextlib.suppress(OSError):  # as where the terminal has been closed
        print(f"infini-ds{where}: {error}", file=sys.stderr, flush=True)
    return code
