"""Runs the whole check, or one part of it in a process of its own."""

import importlib
import os
import sys
import time
from pathlib import Path

from infini_ds.benchmarks.gpu_check.results import Part
from infini_ds.system.exit_code import exit_code

PARTS = {
    "env": "environment", "correct": "correctness", "bench": "times", "sdpa": "times",
    "models": "models", "sweep": "models", "million": "models", "compile_ahead": "compiling",
    "tiles": "tiles", "tiles_compile": "tiles",
}  # fmt: skip
"""Maps each part to the module that has the function of that name."""


def main(arguments: list[str]) -> int:
    """Runs one part if RESULTS is set, as it is by a step; otherwise runs the named steps."""
    results = os.environ.get("RESULTS")
    if not results:
        from infini_ds.benchmarks.gpu_check import plan

        return exit_code(lambda: plan.run(arguments))
    name, *others = arguments
    seconds = float(os.environ.get("PART_SECONDS", "inf"))
    part = Part(os.environ.get("DRY") == "1", Path(results), time.monotonic() + seconds)
    module = importlib.import_module(f"infini_ds.benchmarks.gpu_check.{PARTS[name]}")
    return 0 if getattr(module, name)(part, *others) in (None, True) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
