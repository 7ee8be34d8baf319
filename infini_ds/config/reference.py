"""All settings, as a reference in Markdown and as a JSON schema for editors."""

import json
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel

from infini_ds.config.data import CorpusConfig, MixtureCorpus
from infini_ds.config.run import RunConfig
from infini_ds.config.settings import LARGEST_INTEGER, range_of, section_of

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def reference() -> str:
    """The configuration reference as Markdown, one table a section, from the field docstrings."""
    parts = []
    for prefix, section in _sections("", RunConfig):
        rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
        for name, field in section.model_fields.items():
            if section_of(field.annotation) or not _is_told_here(section, name):
                continue
            default = "required" if field.is_required() else f"`{field.default!r}`"
            kind = _type_name(field.annotation).replace("|", "\\|")
            kind = ", ".join(filter(None, (kind, range_of(field))))
            rows.append(f"| `{prefix}{name}` | {kind} | {default} | {field.description} |")
        title = prefix.rstrip(".") or "run"
        parts.append(f"**{title}**: {(section.__doc__ or '').strip()}\n\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def schema() -> str:
    """A JSON schema of a run's file, for editors that complete settings and mark mistakes.

    It has the names, types, ranges and defaults of all settings, and allows what `Settings` reads
    as what is plainly meant. How settings depend on each other only `load` knows.
    """
    tree = RunConfig.model_json_schema()
    sections = tree["$defs"]
    for section in (tree, *sections.values()):
        for name, setting in section["properties"].items():
            setting.pop("title", None)
            section["properties"][name] = _lenient(setting, name in section.get("required", ()))
    sections["DataConfig"]["anyOf"] = [{"required": ["store"]}, {"required": ["mixture"]}]
    # A run that starts from an export may leave out what the export says of the model.
    model = {"required": sections["ModelConfig"].pop("required")}
    tree["required"].remove("model")
    tree["anyOf"] = [
        {"required": ["init_from"]},
        {"required": ["model"], "properties": {"model": model}},
    ]
    return json.dumps({"$schema": _DIALECT, **tree}, indent=1, ensure_ascii=False) + "\n"


def _lenient(setting: dict[str, Any], required: bool) -> dict[str, Any]:
    """The schema of a setting with the limit of all integers, and with what else may be written.

    Args:
        required: whether the setting must be given, so that it cannot be left empty.
    """
    parts = (setting, *setting.get("anyOf", ()))
    for part in (*parts, *(part.get("items", {}) for part in parts)):
        if part.get("type") == "integer" and "enum" not in part:
            part.setdefault("minimum", -LARGEST_INTEGER)
            part.setdefault("maximum", LARGEST_INTEGER)
    kind = setting.get("type")
    if kind == "boolean":
        del setting["type"]
        return {"enum": [True, False, "yes", "no", "on", "off"], **setting}
    if kind == "array" and setting["items"] == {"type": "string"}:
        return {**setting, "type": ["array", "string"]}
    if required:
        return setting
    if "$ref" in setting:
        return {"anyOf": [{"$ref": setting.pop("$ref")}, {"type": "null"}], **setting}
    if kind == "object" or (kind == "string" and "enum" not in setting):
        return {**setting, "type": [kind, "null"]}
    return setting


def _is_told_here(section: type[BaseModel], setting: str) -> bool:
    """Whether the reference has a row for it here.

    A corpus of a mixture has the settings of `data`, so that only its own are told with it.
    """
    return section is not MixtureCorpus or setting not in CorpusConfig.model_fields


def _sections(prefix: str, section: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    yield prefix, section
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner and _is_told_here(section, name):
            named = "NAME." if inner is MixtureCorpus else ""
            yield from _sections(f"{prefix}{name}.{named}", inner)


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return " | ".join(f"`{value}`" for value in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(part) for part in typing.get_args(annotation))
    if origin is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if origin in (list, tuple):
        return f"list of {_type_name(typing.get_args(annotation)[0])}"
    return "null" if annotation is type(None) else annotation.__name__
