"""The mistake that pydantic found in a tree of settings, in one line."""

import difflib
import types
import typing

from pydantic import BaseModel, ValidationError

from infini_ds.config.settings import section_of


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first thing that is wrong, in one line that names the setting.

    Args:
        root: the section that was read, with all those inside it.
    """
    first = error.errors()[0]
    location, section = _walk([str(part) for part in first["loc"]], root)
    path = ".".join(location)
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(location[-1], section.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(section.model_fields)}"
        said = f"unknown setting {path}; {hint}"
    elif first["type"] == "missing":
        said = f"{path} is required"
    elif first["type"] == "value_error":
        said = f"{path + ': ' if path else ''}{first.get('ctx', {})['error']}"
    else:
        said = f"{path}: {first['msg'].lower()}, got {first['input']!r}"
    return one_line(said)


def one_line(error: object) -> str:
    """The text of an error without its line breaks."""
    return " ".join(str(error).split())


def _walk(location: list[str], root: type[BaseModel]) -> tuple[list[str], type[BaseModel]]:
    """The settings on the way to a mistake, and the section that it is in.

    A location of pydantic ends, for a value of several types, with the one that was tried.
    """
    path: list[str] = []
    section, is_name = root, False
    for part in location:
        path.append(part)
        field = None if is_name else section.model_fields.get(part)
        is_name = False
        if field is None:
            continue
        inner = section_of(field.annotation)
        if inner:
            section, is_name = inner, typing.get_origin(field.annotation) is dict
        elif typing.get_origin(field.annotation) in (typing.Union, types.UnionType):
            break
    return path, section
