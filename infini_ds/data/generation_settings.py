"""A model's generation_config.json: how it writes, where it ends. It goes with its tokenizer."""

import json
from pathlib import Path
from typing import Any

from infini_ds.data.text_encoding import read_text
from infini_ds.errors import UserError
from infini_ds.system.causes import one_line

GENERATION = "generation_config.json"


def read_generation(folder: Path) -> dict[str, Any]:
    """What it says, with the `eos_token_id` of config.json where it names none; often nothing.

    Args:
        folder: of the tokenizer's files.

    Raises:
        UserError: a file cannot be read, or an end is no token's id.
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
    """Writes them, if there are any."""
    if settings:
        (folder / GENERATION).write_text(json.dumps(settings, indent=2) + "\n")


def read_settings(path: Path) -> dict[str, Any]:
    """What a JSON file of settings says, nothing if there is none.

    Raises:
        UserError: it cannot be read, or holds no settings.
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
