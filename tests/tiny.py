"""Settings of models and runs that are as small as they can be.

A test names the settings that it relies on, and no others.
"""

from pathlib import Path
from typing import Any

import yaml

from infini_ds.config import ModelConfig, RunConfig, parse

_MODEL = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "head_dim": 8, "segment_length": 8}


def model_config(**changes) -> ModelConfig:
    """A model of two layers with two heads, whose segments have 8 tokens."""
    return ModelConfig.model_validate(_MODEL | changes)


def run_tree(**changes) -> dict[str, Any]:
    """A run that makes one step on one lane, as its file has it; the store does not exist.

    Args:
        changes: `seed=1` sets a setting, `train={"steps": 3}` adds to a section, and
            `train__steps=3` sets one setting of a section. Later ones win.
    """
    tree: dict[str, Any] = {
        "output_dir": "unused",
        "model": dict(_MODEL),
        "data": {"store": "unused"},
        "train": {"steps": 1, "batch_size": 1},
    }
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        if section:
            tree.setdefault(section, {})[key] = value
        elif isinstance(value, dict):
            tree[name] = tree.get(name, {}) | value
        else:
            tree[name] = value
    return tree


def run_config(**changes) -> RunConfig:
    """The same run with its settings checked."""
    return parse(run_tree(**changes), "of a test")


def write_run(path: Path, **changes) -> Path:
    """Writes the file of the same run; its path."""
    path.write_text(yaml.safe_dump(run_tree(**changes), allow_unicode=True), encoding="utf-8")
    return path
