"""Interprets paths that the user has typed, in a setting or as an argument of a command."""

import os
import re

from infini_ds.errors import UserError

_VARIABLE = re.compile(r"\$([A-Za-z_]\w*|\{.*?(\}|$)|\(.*?(\)|$))")
_LONGEST = 4095
"""Longest path in bytes, on Linux; a name in it may have 255."""
_NO_NAME = re.compile("[\0-\x1f\x7f\ud800-\udfff]")


def as_path(text: str) -> str:
    """Returns a typed path, with `~` or `~user` at its beginning replaced by the home directory.

    Raises:
        ValueError: it has a character that no name should have, names no home directory, or
            contains what looks like a variable while no file has exactly that name.
    """
    check_name(text)
    path = os.path.expanduser(text)
    if os.path.lexists(path):
        return path
    if path.startswith("~"):
        raise ValueError(f"{text}: there is no such home directory; write ./{text} for that name")
    if variable := _VARIABLE.search(text):
        raise ValueError(
            f"{text}: variables are not filled in ({variable[0]}); write the path itself ([$] is "
            "the character in a pattern)"
        )
    return path


def check_name(text: str) -> None:
    """Checks that a path fits in one line of a message and can be handed to every program.

    Raises:
        ValueError: it is too long, not UTF-8, or has a control character such as a line break.
    """
    if _NO_NAME.search(text):
        raise ValueError(f"{text!r} has a line break or another control character, or is not UTF-8")
    if len(text.encode()) > _LONGEST or any(len(part.encode()) > 255 for part in text.split("/")):
        raise ValueError(f"{text[:40]}...: is too long a name")


def argument(name: str, text: str) -> str:
    """Applies `as_path` to a command's argument.

    Raises:
        UserError: it is empty or no valid path; the message names the argument.
    """
    try:
        if not text:
            raise ValueError("is empty, and must name a file or directory")
        return as_path(text)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
