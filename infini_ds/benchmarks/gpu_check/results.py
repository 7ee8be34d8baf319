"""What is found, a line of JSON each, and the same for people. Without torch, whose import takes
seconds."""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

LONGEST_LINE = 420


class Part(NamedTuple):
    """What a part of the check works with."""

    tiny: bool
    """On a CPU, with PyTorch's operators in place of the kernels."""
    results: Path
    deadline: float
    """By time.monotonic: nothing more is begun after it."""

    @property
    def device(self) -> str:
        """Where it computes."""
        return "cpu" if self.tiny else "cuda"

    def late(self) -> bool:
        """Whether nothing more should be begun."""
        return time.monotonic() > self.deadline

    def note(self, part: str, **figures: Any) -> None:
        """Prints a row and appends it, so that nothing is lost when the time is over."""
        line = json.dumps({"part": part, **figures})
        print(line, flush=True)
        with self.results.open("a") as file:  # of several processes at once: one write each
            file.write(line + "\n")


def rows(path: Path) -> list[dict[str, Any]]:
    """All rows so far; one that its writer did not end is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def summary(path: Path) -> list[str]:
    """Each row short, but for the times of single tiles, which have rows of all."""
    return [_short(row) for row in rows(path) if row["part"] != "tile"]


def _short(row: dict[str, Any]) -> str:
    figures = (f"{name} {_rounded(value)}" for name, value in row.items() if name != "part")
    return f"{row['part']}: {', '.join(figures)}"[:LONGEST_LINE]


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
