"""Figures for programs: what `--json FILE` writes."""

import json
from pathlib import Path
from typing import Any

from infini_ds.errors import RunError


def write_figures(path: str | Path | None, figures: Any) -> None:
    """Writes figures as JSON, if a path is given.

    Raises:
        RunError: they cannot be written.
    """
    if path is None:
        return
    try:
        Path(path).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"--json {path}: cannot be written ({error.strerror})") from None
