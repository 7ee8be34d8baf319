"""The console that commands print on."""

import os
import sys
import threading
from typing import Any

import rich.console
from rich.measure import Measurement
from rich.table import Table

from infini_ds.errors import RunError

_WIDEST = 10_000


class Console(rich.console.Console):
    """Prints text as it is, without taking any of it for markup, paths or field names.

    Results may have cost hours. If the reader of the output is gone (`| head`), the rest is dropped
    and the work continues.

    Args:
        stderr: print on standard error instead of standard output.
        must_be_read: the work is useless without a reader, so the program ends when the reader is
            gone, with the exit code that `exit_code` has for that.
    """

    def __init__(self, stderr: bool = False, must_be_read: bool = False):
        super().__init__(
            stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True
        )  # fmt: skip
        self._must_be_read = must_be_read

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints as rich does, with tables at least as wide as their figures.

        Raises:
            RunError: the output cannot be written.
        """
        for table in objects:
            if isinstance(table, Table) and not any(c.overflow == "fold" for c in table.columns):
                _widen(table, self)
        try:
            super().print(*objects, **options)
        except OSError as error:
            stream = "standard error" if self.stderr else "standard output"
            raise RunError(f"{stream}: cannot be written ({error.strerror})") from None

    def on_broken_pipe(self) -> None:
        """Handles a reader that is gone, see the class."""
        if self._must_be_read:
            super().on_broken_pipe()  # ends the program
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, (sys.stderr if self.stderr else sys.stdout).fileno())
        os.close(nowhere)


def leave_to_the_caller() -> None:
    """Silences write errors of TensorBoard's thread, because its caller gets them as well."""

    def failed(failure: threading.ExceptHookArgs) -> None:
        if not issubclass(failure.exc_type, OSError):
            threading.__excepthook__(failure)

    threading.excepthook = failed


def _widen(table: Table, console: Console) -> None:
    """Lets a table overflow a terminal that would abbreviate its figures."""
    options = console.options.update(max_width=_WIDEST)
    needed = Measurement.get(console, options, table).maximum
    if needed > console.width:
        table.width = needed
