"""The base of every section, which reads values and says when one is out of its range."""

import re
import typing
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.fields import FieldInfo

from infini_ds.system.paths import as_path

LARGEST_INTEGER = 2**31 - 1
"""The limit of all integers, since more tokens, steps or bytes than these must be a slip."""
RESOLVED = "resolved"
"""Validation context of a run's own config, whose paths stay as they were written."""
SMALLEST_EPSILON = 1e-30
"""The least that may keep a division from 0 / 0; a smaller one would itself be 0 in fp32."""
_SPOKEN = {"yes": True, "on": True, "no": False, "off": False}
_RANGE_ERRORS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}


def _as_typed(text: str, info: ValidationInfo) -> str:
    return text if info.context == RESOLVED else as_path(text)


PathText = Annotated[str, AfterValidator(_as_typed)]
"""A path, or empty. Paths that decide what is in a store, such as data.files, stay as typed."""


class RangeText(NamedTuple):
    """The words for a field's range, put into its annotation if the bounds alone say too little."""

    text: str


class Settings(BaseModel):
    """Base of every section: keyword only and immutable, without unknown keys or infinite numbers.

    A value is converted only if YAML reads it as another type than is plainly meant. Each field
    has its own range (`Field(ge=1)`), and a number outside of it is an error of the section, as in
    `steps (0) must be at least 1`.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _read(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        fields = cls.model_fields
        return {
            name: _as_meant(fields[name].annotation, value) if name in fields else value
            for name, value in tree.items()
        }

    @model_validator(mode="wrap")
    @classmethod
    def _tell_ranges(cls, tree: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            field = cls.model_fields.get(str(first["loc"][0])) if first["loc"] else None
            if field is None or first["type"] not in _RANGE_ERRORS or section_of(field.annotation):
                raise
            value = float(first["input"]) if field.annotation is float else first["input"]
            small = isinstance(value, float) or abs(value) <= LARGEST_INTEGER
            right = range_of(field) if small else _ANY_INTEGER
            raise ValueError(f"{first['loc'][0]} ({value}) must be {right}") from None

    @model_validator(mode="after")
    def _check_integers(self) -> "Settings":
        for name in type(self).model_fields:
            value = getattr(self, name)
            for number in value if isinstance(value, list | tuple) else [value]:
                if isinstance(number, int) and abs(number) > LARGEST_INTEGER:
                    raise ValueError(f"{name} ({value}) must be {_ANY_INTEGER}")
        return self


def _as_meant(kind: Any, value: Any) -> Any:
    """A value as the person who wrote it plainly meant it.

    Nothing stands for an empty string or section, `yes` for true, 1e6 for an integer, and one
    string for a list of them.
    """
    whole = typing.get_origin(kind) or kind
    if value is None and isinstance(whole, type) and issubclass(whole, (str, Settings, dict)):
        return "" if whole is str else {}
    if kind is bool and isinstance(value, str):
        return _SPOKEN.get(value.lower(), value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value) if abs(value) < 2**53 else value
    if kind == list[str] and isinstance(value, str):
        return [value]
    return value


def require_growing(name: str, numbers: list[int], least: int) -> None:
    """Raises a ValueError unless there are numbers, and each is larger than the one before.

    Args:
        name: of the setting, for the message.
        least: the smallest that the first may be.
    """
    if not numbers or numbers[0] < least or numbers != sorted(set(numbers)):
        raise ValueError(f"{name} ({numbers}) must be growing numbers of at least {least}")


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, alone, under names or as an option; None if it holds none."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def range_of(field: FieldInfo) -> str:
    """The range of a number, as in `at least 1`; empty if the field has none."""
    metadata = list(field.metadata)
    for part in typing.get_args(field.annotation):  # such as `Annotated[int, Field(ge=1)] | None`
        for each in getattr(part, "__metadata__", ()):
            metadata += each.metadata if isinstance(each, FieldInfo) else [each]
    for each in metadata:
        if isinstance(each, RangeText):
            return each.text
    bounds = {
        name: _number(getattr(each, name))
        for each in metadata
        for name in ("ge", "gt", "le", "lt")
        if getattr(each, name, None) is not None
    }
    if {"ge", "lt"} <= bounds.keys():
        return f"in [{bounds['ge']}, {bounds['lt']})"
    if {"ge", "le"} <= bounds.keys():
        return f"from {bounds['ge']} to {bounds['le']}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return " and ".join(f"{words[name]} {bound}" for name, bound in bounds.items())


def _number(value: float) -> str:
    """A bound as people write it: 1e-6, not 1e-06."""
    return str(value) if isinstance(value, int) else re.sub(r"e\+?(-?)0*", r"e\1", f"{value:g}")


_ANY_INTEGER = f"from -{LARGEST_INTEGER} to {LARGEST_INTEGER}"
