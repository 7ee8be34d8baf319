"""How a path is meant that somebody has typed, in a setting or as an argument of a command."""

import os
import re

from infini_ds.errors import UserError

_VARIABLE = re.compile(r"\$([A-Za-z_]\w*|\{.*?(\}|$)|\(.*?(\)|$))")
_LONGEST = 4095
"""Bytes of a path, on Linux; of a name in it 255."""
_NO_NAME = re.compile("[\0-\x1f\x7f\ud800-\udfff]")


def as_path(text: str) -> str:
    """A path as it is typed, but for `~` and `~user` at its beginning: the home directory.

    Raises:
        ValueError: it has what no name should have, names no home directory, or has what looks
            like a variable and is not there under just this name.
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
    """Whether a path can be told in one line, and handed to every program.

    Raises:
        ValueError: it has a control character, such as a line break, is not UTF-8, or too long.
    """
    if _NO_NAME.search(text):
        raise ValueError(f"{text!r} has a line break or another control character, or is not UTF-8")
    if len(text.encode()) > _LONGEST or any(len(part.encode()) > 255 for part in text.split("/")):
        raise ValueError(f"{text[:40]}...: is too long a name")


def argument(name: str, text: str) -> str:
    """`as_path` of a command's argument.

    Raises:
        UserError: it is empty, or no path; in one line with its name.
    """
    try:
        if not text:
            raise ValueError("is empty, and must name a file or directory")
        return as_path(text)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
