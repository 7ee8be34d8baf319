"""Configs from files, overrides and exports, and back to YAML."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from infini_ds.config.data import TOKENIZER_FILES
from infini_ds.config.explain import explain, one_line
from infini_ds.config.export import ExportConfig
from infini_ds.config.read_yaml import read_value, read_yaml, write_yaml
from infini_ds.config.run import RunConfig
from infini_ds.config.settings import RESOLVED
from infini_ds.errors import UserError
from infini_ds.system import shipped
from infini_ds.system.paths import argument


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Reads a run's YAML file and applies overrides such as `train.steps=100`.

    Args:
        path: the file, or the name of a config that comes with the package.

    Raises:
        UserError: the file is missing or not YAML, or a key or value is wrong; one line.
    """
    path = shipped.config(Path(path))
    tree = _read(path)
    for override in overrides:
        _apply(tree, override)
    if isinstance(tree.get("init_from"), str) and tree["init_from"]:
        _take_from_export(tree, Path(argument("init_from", tree["init_from"])))
    config = parse(tree, str(path))
    if not all(corpus.store for corpus in config.data.corpora.values()):
        raise UserError(f"config {path}: data.store must name the directory of the token store")
    return config


def load_resolved(path: Path) -> RunConfig:
    """Reads a run's own config.yaml, which `dump` wrote. No file that it names is looked at.

    Raises:
        UserError: the file is missing or not YAML, or a key or value is wrong; one line.
    """
    return parse(_read(path), str(path), RESOLVED)


def parse(tree: dict[str, Any], origin: str, context: str | None = None) -> RunConfig:
    """Validates a tree of settings.

    Args:
        origin: where they are from, for messages.
        context: RESOLVED if they are a run's own, so that paths stay as they are.

    Raises:
        UserError: the first thing that is wrong, in one line naming the setting and `origin`.
    """
    try:
        return RunConfig.model_validate(tree, context=context)
    except ValidationError as error:
        raise UserError(f"config {origin}: {explain(error, RunConfig)}") from None


def parse_export(text: str, origin: str, directory: Path) -> ExportConfig:
    """Validates the text of an export's config.yaml. Keys that are none of ours are ignored.

    Args:
        origin: where it is from, for messages.
        directory: where the export's tokenizer would be.

    Raises:
        UserError: it is not YAML with a model, or a setting is wrong; one line naming `origin`.
    """
    try:
        tree = read_yaml(text)
        said = {"model": tree["model"], "directory": str(directory)}
        if "tokenizer" in tree:
            said["tokenizer"] = tree["tokenizer"]
    except (yaml.YAMLError, KeyError, TypeError):
        raise UserError(f"config {origin}: must be YAML with the key `model`") from None
    try:
        return ExportConfig.model_validate(said)
    except ValidationError as error:
        raise UserError(f"config {origin}: {explain(error, ExportConfig)}") from None


def dump(config: RunConfig) -> str:
    """The resolved config as YAML: every setting, defaults included."""
    return write_yaml(config.model_dump())


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(path.read_bytes())
    except OSError as error:
        raise UserError(f"config {path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise UserError(f"config {path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: must be a mapping of settings, is {type(tree).__name__}")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: must look like key.path=value")
    node = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        inner = {} if node.get(parent) is None else node[parent]
        if not isinstance(inner, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section")
        node[parent] = node = dict(inner)  # one of its own: an alias gives two names to the same
    try:
        node[leaf] = read_value(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: {one_line(error)}") from None


def _take_from_export(tree: dict[str, Any], export: Path) -> None:
    """Fills in what the tree leaves out about the model and its tokenizer from an export.

    The export may be gone if the config has the settings of `model` itself, as that of a run that
    has begun does.
    """
    try:
        known = read_yaml((export / "config.yaml").read_bytes())
        model = known["model"]
    except OSError as error:
        if "model" in tree:
            return
        raise UserError(
            f"init_from ({export}): its config.yaml cannot be read ({error.strerror}); name a "
            "directory that `infini-ds convert` made, or give the settings of `model`"
        ) from None
    except (yaml.YAMLError, KeyError, TypeError):
        raise UserError(f"config {export / 'config.yaml'}: must be YAML with `model`") from None
    tree["model"] = _filled(tree.get("model") or {}, model)
    data = tree.get("data")
    if not isinstance(data, dict):
        return
    given = data.get("tokenizer", {})
    if isinstance(given, dict) and not given.keys() & {"kind", "model"} and "tokenizer" in known:
        file = TOKENIZER_FILES.get(str(known["tokenizer"]))
        model_file = str(export / file) if file else ""
        data["tokenizer"] = {"kind": known["tokenizer"], "model": model_file, **given}


def _filled(given: Any, missing: Any) -> Any:
    """A tree of settings, completed with those that it lacks."""
    if not isinstance(given, dict) or not isinstance(missing, dict):
        return given
    return {**missing, **{name: _filled(own, missing.get(name)) for name, own in given.items()}}
