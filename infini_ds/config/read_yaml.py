"""YAML as people write settings in it. Whatever cannot be read raises one kind of error.

Plain values mean what they do in YAML 1.2, and merge keys (`<<: *anchor`) are understood. What one
reader of YAML takes for another number than the next (`010`) is refused.
"""

import re
import reprlib
from typing import Any

import yaml

_QUOTE = "put the value in quotes, and those into others, as the shell takes the outer ones"


def read_yaml(text: str | bytes) -> Any:
    """Reads a text.

    Args:
        text: bytes must be UTF-8, or UTF-16 with a byte order mark at the beginning.

    Raises:
        yaml.YAMLError: it is not YAML, or has a value that no setting can have.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def read_value(text: str) -> Any:
    """Reads what follows the `=` of an override, as `read_yaml` does, but drops nothing of it.

    Raises:
        yaml.YAMLError: it is not YAML, or has a comment, or white space that YAML does not keep.
    """
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        odd = text[:1] in ("*", "&", "!", "%", "@", "`")
        raise yaml.YAMLError(f"{error}; {_QUOTE}" if odd else error) from None
    events = [*yaml.parse(text)]
    content = events[-3] if len(events) > 2 else None  # before the document's end and the stream's
    rest = text[content.end_mark.index if content else 0 :].strip()
    if rest:
        raise yaml.YAMLError(f"{rest!r} would be a comment; {_QUOTE}")
    plain = isinstance(content, yaml.ScalarEvent) and content.style is content.tag is None
    kept = value if plain and isinstance(value, str) else text if content else ""
    if kept != text:
        raise yaml.YAMLError(f"it would be read as {value!r}; {_QUOTE}")
    return value


def write_yaml(value: Any) -> str:
    """A text that `read_yaml` and readers of YAML 1.1 understand alike, in the value's order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Plain values have the types of YAML 1.2; keys that are given twice are refused."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        known = set()  # here, as what is merged into it later is not given twice
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in known:
                    raise yaml.YAMLError(f"key {key.value!r} is given twice{key.start_mark}")
                known.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception:  # PyYAML lets through whatever Python's conversions raise
            raise _refused(node, f"is not of type {node.tag.rpartition(':')[2]}") from None

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        text = super().construct_yaml_str(node)
        # JSON writes characters beyond 16 bits as two, of which PyYAML makes one and one.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        if re.search("[\0\ud800-\udfff]", text):  # in no path, and the latter in no file
            raise _refused(node, "has a NUL or half a character")
        return text

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if re.fullmatch("[-+]?0[0-9_]+", node.value):
            raise _refused(
                node, "is octal to some and decimal to others; write it with 0o, or without the 0"
            )
        number = super().construct_yaml_int(node)
        if number.bit_length() > 64:  # Python does not even print them all
            raise _refused(node, "is too large")
        return number


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would take for something else."""


def _refused(node: yaml.Node, why: str) -> yaml.YAMLError:
    return yaml.YAMLError(f"{reprlib.repr(node.value)} {why}{node.start_mark}")


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_PLAIN = {  # in this order; without dates, times (`1:30`), `yes` and `no`
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": ("<<", "<"),
    "int": ("[-+]?(0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)", "-+0123456789"),
    "float": (
        r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
_Loader.yaml_implicit_resolvers = {}
for _tag, (_form, _first) in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_form})$"), list(_first)
        )
