"""Records results as lines of JSON, and prints them for people.

The module does not import torch, which would take seconds.
"""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

LONGEST_LINE = 420


class Part(NamedTuple):
    """Everything that a part of the check needs to know."""

    tiny: bool
    """Whether it runs on a CPU, with PyTorch's operators in place of the kernels."""
    results: Path
    deadline: float
    """Time by time.monotonic after which nothing more is started."""

    @property
    def device(self) -> str:
        """The device that it computes on."""
        return "cpu" if self.tiny else "cuda"

    def late(self) -> bool:
        """Whether it is too late to start anything more."""
        return time.monotonic() > self.deadline

    def note(self, part: str, **figures: Any) -> None:
        """Prints a row and appends it to the results, so that a timeout loses nothing."""
        line = json.dumps({"part": part, **figures})
        print(line, flush=True)
        with self.results.open("a") as file:  # shared by several processes: one write per line
            file.write(line + "\n")


def rows(path: Path) -> list[dict[str, Any]]:
    """Reads all rows so far, without one that its writer has not finished."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def summary(path: Path) -> list[str]:
    """Shortens each row; times of single tiles are left out, because other rows summarize them."""
    return [_short(row) for row in rows(path) if row["part"] != "tile"]


def _short(row: dict[str, Any]) -> str:
    figures = (f"{name} {_rounded(value)}" for name, value in row.items() if name != "part")
    return f"{row['part']}: {', '.join(figures)}"[:LONGEST_LINE]


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
