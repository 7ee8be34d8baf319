"""Computes the cases of test_triton.py through Triton's interpreter: CASES.json RESULTS.json.

A process of its own: Triton decides when it is imported whether kernels are interpreted.
"""

import json
import sys
from pathlib import Path

from tests.kernels import interpreter  # noqa: F401  (before any kernel)

# isort: split
import torch

from infini_ds.kernels.infini_attention.reference import infini_attention_reference
from infini_ds.kernels.infini_attention.triton import op, tuning
from tests.kernels import test_infini_attention as plain

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def errors(expected: plain.Result, actual: plain.Result) -> list[float]:
    """Of outputs, then gradients, each as a share of the expected one's norm."""
    pairs = zip(expected, actual, strict=True)
    return [
        plain.error_ratio(want, have)
        for wants, haves in pairs
        for want, have in zip(wants, haves, strict=True)
    ]


def compute(case: dict) -> dict[str, list[float]]:
    plain.DIM = case["d"]
    if case["tile"]:
        rows, columns = case["tile"]
        small = tuning.Tiles(max(rows, columns), min(rows, columns), 4, 1)
        of_keys = tuning.Tiles(rows, columns, 4, 1)
        op.tiles = lambda kernel, *_: of_keys if kernel == "key_gradient" else small
    else:
        op.tiles = tuning.tiles
    layout = plain.make_layout(case["layout"], case["n"])
    inputs = plain.make_inputs(layout, case["n"], case["group"], case["gated"])
    rule, dtype = case["rule"], DTYPES[case["precision"]]
    arguments = (inputs, layout, rule)
    exact = plain.compute(infini_attention_reference, *arguments, torch.float64, torch.float64)
    # Memory that nothing was written to holds NaN.
    torch.use_deterministic_algorithms(True)
    ours = plain.compute(op.infini_attention_triton, *arguments, dtype, torch.float32)
    torch.use_deterministic_algorithms(False)
    pytorch = plain.compute(infini_attention_reference, *arguments, dtype, dtype)
    return {"ours": errors(exact, ours), "pytorch": errors(exact, pytorch)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = []
    for case in cases:
        results.append(compute(case))
        print(case, results[-1], flush=True)
    Path(sys.argv[2]).write_text(json.dumps(results))
