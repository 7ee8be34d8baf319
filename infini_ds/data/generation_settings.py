"""A model's generation_config.json: how it writes, where it ends. It goes with its tokenizer."""

import json
from pathlib import Path
from typing import Any

from infini_ds.errors import UserError

GENERATION = "generation_config.json"


def read_generation(folder: Path) -> dict[str, Any]:
    """What it says, with the `eos_token_id` of config.json where it names none; often nothing.

    Args:
        folder: of the tokenizer's files.

    Raises:
        UserError: a file cannot be read, or an end is no token's id.
    """
    tree = _read(folder / GENERATION)
    for file in (GENERATION, "config.json"):
        ends = _read(folder / file).get("eos_token_id")
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


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must be a mapping of settings")
    return tree
