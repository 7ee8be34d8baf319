"""YAML as settings are written in it: whatever cannot be read is one kind of error."""

import re
import reprlib
from typing import Any

import yaml


def read_yaml(text: str) -> Any:
    """What a text says.

    Raises:
        yaml.YAMLError: it is not YAML, or has a value that no setting can have.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """YAML that reads `3e-4` as a number (YAML 1.1 wants `3.0e-4`), leaves dates as they are
    written, and refuses repeated keys."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception:  # PyYAML lets through whatever Python's conversions raise
            raise _refused(node, f"is not of type {node.tag.rpartition(':')[2]}") from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        known = []
        # `!!map [a]` is none, which PyYAML tells itself.
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            key = self.construct_object(key_node)
            if key in known:
                raise yaml.YAMLError(f"key {key!r} is given twice{key_node.start_mark}")
            known.append(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        text = super().construct_yaml_str(node)
        if re.search("[\0\ud800-\udfff]", text):  # in no path, and the latter in no file
            raise _refused(node, "has a NUL or half a character")
        return text

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number = super().construct_yaml_int(node)
        if number.bit_length() > 64:  # Python does not even print them all
            raise _refused(node, "is too large")
        return number


def _refused(node: yaml.Node, why: str) -> yaml.YAMLError:
    return yaml.YAMLError(f"{reprlib.repr(node.value)} {why}{node.start_mark}")


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
