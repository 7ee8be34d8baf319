"""Figures for programs: what `--json FILE` writes."""

import json
import math
from pathlib import Path
from typing import Any

from infini_ds.system.whole_file import whole_file


def write_figures(path: str | Path | None, figures: Any) -> None:
    """Writes figures as JSON, if a path is given. What is no number is null, as JSON has no nan.

    Raises:
        UserError: they cannot be written.
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
