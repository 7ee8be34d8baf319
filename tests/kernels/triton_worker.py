"""Computes the cases of triton_cases.py through Triton's interpreter: CASES.json RESULTS.json.

A process of its own: Triton decides when it is imported whether kernels are interpreted.
"""

import json
import sys
from pathlib import Path

from tests.kernels import interpreter  # noqa: F401  (before any kernel)

# isort: split
import torch

from tests.kernels.triton_cases import compute, compute_trial

if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = []
    for case in cases:
        results.append((compute_trial if "trial" in case else compute)(case, "cpu"))
        print(case, results[-1], flush=True)
    Path(sys.argv[2]).write_text(json.dumps(results))
