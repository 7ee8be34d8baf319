"""The JSON schema of a run's file, by which editors complete and check it."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from infini_ds import cli
from infini_ds.config import RunConfig, dump, load, parse, schema
from infini_ds.config.read_yaml import read_yaml
from infini_ds.errors import UserError
from tests.config.test_config import CONFIGS, TREE, mixture_tree

SCHEMA = json.loads(schema())
FILE = Path(__file__).parents[2] / "configs" / "schema.json"
ABOUT = {"$defs", "$schema", "default", "description", "title"}
TYPES: dict[str, Any] = {
    "array": list, "boolean": bool, "null": type(None), "number": (int, float), "object": dict,
    "string": str,
}  # fmt: skip


def is_of(value: Any, kind: str) -> bool:
    if kind == "integer":
        return is_of(value, "number") and value == int(value)
    return isinstance(value, TYPES[kind]) and isinstance(value, bool) <= (kind == "boolean")


def is_valid(value: Any, rules: dict[str, Any]) -> bool:
    """Whether a value is as a schema asks, which has only keywords that are known here."""
    return all(holds(value, name, rule, rules) for name, rule in rules.items())


def holds(value: Any, name: str, rule: Any, rules: dict[str, Any]) -> bool:
    if name in ABOUT:
        return True
    if name == "$ref":
        return is_valid(value, SCHEMA["$defs"][rule.removeprefix("#/$defs/")])
    if name == "anyOf":
        return any(is_valid(value, each) for each in rule)
    if name == "type":
        return any(is_of(value, kind) for kind in ([rule] if isinstance(rule, str) else rule))
    if name == "enum":
        return any(value == each and type(value) is type(each) for each in rule)
    if name == "const":
        return value == rule
    if name == "pattern":
        return not isinstance(value, str) or re.search(rule, value) is not None
    limits = {
        "minimum": lambda: value >= rule, "exclusiveMinimum": lambda: value > rule,
        "maximum": lambda: value <= rule, "exclusiveMaximum": lambda: value < rule,
    }  # fmt: skip
    if name in limits:
        return not is_of(value, "number") or limits[name]()
    of_lists = {
        "items": lambda: all(is_valid(each, rule) for each in value),
        "minItems": lambda: len(value) >= rule,
        "uniqueItems": lambda: len(set(value)) == len(value),
    }
    if name in of_lists:
        return not isinstance(value, list) or of_lists[name]()
    of_objects = {
        "required": lambda: value.keys() >= set(rule),
        "propertyNames": lambda: all(is_valid(each, rule) for each in value),
        "properties": lambda: all(
            is_valid(value[each], own) for each, own in rule.items() if each in value
        ),
        "additionalProperties": lambda: all(
            isinstance(rule, dict) and is_valid(value[each], rule)
            for each in value.keys() - rules.get("properties", {}).keys()
        ),
    }
    return not isinstance(value, dict) or of_objects[name]()


def with_setting(path: str, value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(TREE)
    *parents, leaf = path.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
    node[leaf] = value
    return tree


def test_file_beside_the_configs_is_what_the_command_prints(capsys):
    assert cli.main(["config", "--schema"]) == 0
    printed = capsys.readouterr().out
    assert printed == schema()
    assert FILE.read_text() == printed, "run `make docs`"


def test_it_is_that_of_all_settings(capsys):
    assert cli.main(["config", "--schema", "configs/quickstart.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--schema: describes all settings; leave out CONFIG" in line


def test_it_is_printed_before_torch_is_loaded():
    code = (
        "import sys; from infini_ds import cli; cli.main(['config', '--schema']); "
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "deepspeed"} & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
class TestShippedConfig:
    def test_names_the_schema_in_its_first_line(self, path):
        assert path.read_text().splitlines()[0] == f"# yaml-language-server: $schema={FILE.name}"

    def test_is_valid(self, path):
        assert is_valid(read_yaml(path.read_text()), SCHEMA)

    def test_is_valid_with_all_its_settings(self, path):
        assert is_valid(yaml.safe_load(dump(load(path))), SCHEMA)


def test_every_setting_is_described_and_others_are_refused():
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert SCHEMA["properties"].keys() == RunConfig.model_fields.keys()
    for section in (SCHEMA, *SCHEMA["$defs"].values()):
        assert section["additionalProperties"] is False
        for setting in section["properties"].values():
            parts = [setting, *setting.get("anyOf", ())]
            names = [part["$ref"].split("/")[-1] for part in parts if "$ref" in part]
            assert "description" in setting or any(
                "description" in SCHEMA["$defs"][name] for name in names
            )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("train.steps", 1e6), ("resume", "yes"), ("resume", False), ("data.files", "a.txt"),
        ("data.files", ["a.txt"]), ("data.weighted_field", None), ("optimizer", None),
        ("data.passkey", None), ("data.babilong", None), ("train.curriculum", None),
        ("train.hang_timeout", None),
        ("train.hang_timeout", 3), ("parallel.pipeline_stages", "auto"),
        ("parallel.pipeline_stages", 2), ("parallel.zero_stage", 0), ("model.rope_scaling", {}),
        ("model.norm_eps", 1), ("data.held_out_fraction", 0), ("seed", -(2**31) + 1),
        ("data.mixture", None), ("data.passkey.keys", 4), ("data.passkey.keys", [1, 4]),
        ("data.passkey.queries", "all"),
    ],
)  # fmt: skip
def test_what_is_read_is_valid(path, value):
    tree = with_setting(path, value)
    assert parse(tree, "of a test")
    assert is_valid(tree, SCHEMA)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("train.stepz", 3), ("train.steps", 0), ("train.steps", 1.5), ("train.steps", True),
        ("train.steps", "many"), ("train.steps", None), ("train.steps", 2**31), ("seed", 2**31),
        ("seed", -(2**31)), ("train.dtype", "fp16"), ("train.timeout", 0),
        ("train.timeout", 1e6), ("train.threads", 1025), ("train", None), ("data", None),
        ("model", None), ("model.hidden_size", 2**20 + 1), ("model.norm_eps", 0),
        ("model.gate_init", 10001), ("optimizer.beta1", 1), ("optimizer.learning_rate", 0),
        ("parallel.pipeline_stages", 0), ("parallel.pipeline_stages", "two"),
        ("parallel.zero_stage", 4), ("data.files", None), ("data.files", [1]),
        ("data.text_field", 3), ("data.held_out_fraction", 1), ("data.passkey.segments", []),
        ("data.babilong.tasks", []), ("data.babilong.tasks", ["qa4"]),
        ("data.passkey.segments", [2, 2]), ("data.passkey.segments", [2, 4 * 10**9]),
        ("data.passkey.keys", []), ("data.passkey.keys", [2, 2]), ("data.passkey.keys", 0),
        ("data.passkey.keys", [2, 2**31]), ("data.passkey.queries", "any"),
        ("data.mixture", {"a b": {"store": "stores/a"}}), ("resume", "maybe"),
        ("output_dir", None), ("data.tokenizer.vocab_size", 319), ("data", {"files": "a.txt"}),
    ],
)  # fmt: skip
def test_what_is_refused_is_not_valid(path, value):
    tree = with_setting(path, value)
    with pytest.raises(UserError):
        parse(tree, "of a test")
    assert not is_valid(tree, SCHEMA)


def test_mixtures_are_valid():
    assert is_valid(mixture_tree(), SCHEMA)
    assert not is_valid(mixture_tree(mixture={"a": {"store": "a", "weight": 0}}), SCHEMA)


@pytest.mark.parametrize("path", ["model", "model.hidden_size"])
def test_model_may_be_left_out_where_an_export_has_it(path):
    tree = with_setting("seed", 1)
    *parents, leaf = path.split(".")
    del (tree[parents[0]] if parents else tree)[leaf]
    assert not is_valid(tree, SCHEMA)
    assert is_valid(tree | {"init_from": "exports/a"}, SCHEMA)
