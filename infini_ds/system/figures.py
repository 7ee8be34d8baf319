"""Writes figures for programs, the file of `--json FILE`, and reads them again."""

import json
import math
from pathlib import Path
from typing import Any

from infini_ds.system.whole_file import whole_file


def write_figures(path: str | Path | None, figures: Any) -> None:
    """Writes figures as JSON if a path is given. NaN and infinities, unknown to JSON, become null.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        return
    text = json.dumps(_finite(figures), indent=1, allow_nan=False) + "\n"
    with whole_file(path, "--json") as file:
        file.write_text(text, encoding="utf-8")


def _finite(figures: Any) -> Any:
    if isinstance(figures, dict):
        return {name: _finite(value) for name, value in figures.items()}
    if isinstance(figures, (list, tuple)):
        return [_finite(value) for value in figures]
    return None if isinstance(figures, float) and not math.isfinite(figures) else figures


def read_figures(path: Path) -> dict[str, Any]:
    """Reads figures for a page or card, which must do without what cannot be read: {} then."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}
