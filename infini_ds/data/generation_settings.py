"""Reads and keeps a model's generation_config.json, which travels with its tokenizer."""

import json
from pathlib import Path
from typing import Any

from infini_ds.data.text_encoding import read_text
from infini_ds.errors import UserError
from infini_ds.system.causes import one_line

GENERATION = "generation_config.json"


def read_generation(folder: Path) -> dict[str, Any]:
    """Reads the settings for generation; often there are none.

    If they name no `eos_token_id`, that of config.json is added.

    Args:
        folder: the folder with the tokenizer's files.

    Raises:
        UserError: a file cannot be read, or an `eos_token_id` is not a token id.
    """
    tree = read_settings(folder / GENERATION)
    for file in (GENERATION, "config.json"):
        ends = read_settings(folder / file).get("eos_token_id")
        if ends is None:
            continue
        ends = ends if isinstance(ends, list) else [ends]
        if not all(type(i) is int and i >= 0 for i in ends):
            raise UserError(f"{folder / file}: eos_token_id must be ids of tokens, got {ends}")
        return {**tree, "eos_token_id": ends}
    return tree


def save_generation(settings: dict[str, Any], folder: Path) -> None:
    """Writes the settings, if there are any."""
    if settings:
        (folder / GENERATION).write_text(json.dumps(settings, indent=2) + "\n")


def read_settings(path: Path) -> dict[str, Any]:
    """Reads a JSON file of settings; returns an empty dict if there is no such file.

    Raises:
        UserError: the file cannot be read, or does not hold settings.
    """
    try:
        tree = json.loads(read_text(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must be a mapping of settings")
    return tree
