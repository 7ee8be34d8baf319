"""Arguments of a program that are checked where they are declared."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from infini_ds.errors import UserError


class Checked(argparse.Action):
    """Stores what `check` makes of an argument, or of each one where there are several.

    A mistake passes through argparse, which would print its usage for one that `type` finds.

    Args:
        check: takes the name of the argument and what `type` has made of its text, and returns
            what is meant. It raises UserError if the argument is wrong.
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
        elif values is not None:  # an argument that may be left out
            meant = self._check(name, values)
        setattr(namespace, self.dest, meant)


def at_least(least: int) -> Callable[[str, int], int]:
    """A check of a number that must not be smaller."""

    def check(name: str, value: int) -> int:
        if value < least:
            raise UserError(f"{name} ({value}) must be at least {least}")
        return value

    return check
