"""Checks command-line arguments where they are declared."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from infini_ds.errors import UserError


class Checked(argparse.Action):
    """Stores the result of `check` for an argument, or for each of several values.

    Errors pass through argparse unchanged, whereas an error raised by `type` would print its usage.

    Args:
        check: called with the argument's name and the value that `type` returned; returns the
            value to store. It raises UserError if the argument is wrong.
    """

    def __init__(self, *arguments: Any, check: Callable[[str, Any], Any], **options: Any):
        super().__init__(*arguments, **options)
        self._check = check

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        name = self.option_strings[-1] if self.option_strings else self.dest
        meant: Any = values
        if isinstance(values, list):
            meant = [self._check(name, value) for value in values]
        elif values is not None:  # None: the argument was left out
            meant = self._check(name, values)
        setattr(namespace, self.dest, meant)


def at_least(least: int) -> Callable[[str, int], int]:
    """Returns a check that a number is not smaller than `least`."""

    def check(name: str, value: int) -> int:
        if value < least:
            raise UserError(f"{name} ({value}) must be at least {least}")
        return value

    return check
