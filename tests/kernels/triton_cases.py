"""Calls of the Triton kernels that are compared with the specification, and how close they come."""

import torch

from infini_ds.kernels.infini_attention.reference import infini_attention_reference
from infini_ds.kernels.infini_attention.triton import op, tuning
from tests.kernels import test_infini_attention as plain

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMITS = {"fp32": (1e-5, 1e-5), "bf16": (5e-3, 8e-3)}
OUTPUTS = 3  # output, kv, norm; gradients follow


def case(layout, rule, precision, n, group=1, gated=False, d=64, tile=None):
    """tile: rows and columns of key_gradient, the others have rows >= columns; None: a GPU's."""
    return {
        "layout": layout, "rule": rule, "precision": precision, "n": n, "group": group,
        "gated": gated, "d": d, "tile": tile,
    }  # fmt: skip


CASES = [
    # Every layout by both rules, with parts of tiles and tiles that end early.
    *(
        case(layout, rule, "fp32", n, group, gated)
        for layout, n, group, gated in (
            ("carried memory", 17, 1, False),
            ("empty memory", 7, 2, True),
            ("mid-window starts", 40, 1, True),
            ("padding", 40, 1, True),
            ("segments without tokens", 17, 1, False),
            ("one segment", 63, 3, True),
        )
        for rule in ("linear", "delta")
    ),
    case("padding", "linear", "fp32", 17, d=128),
    # Small tiles, so that there are many, wider and higher ones; then those of a GPU.
    case("mid-window starts", "delta", "bf16", 40, 1, False, tile=(16, 32)),
    case("padding", "linear", "bf16", 40, 2, True, tile=(32, 16)),
    case("one segment", "linear", "bf16", 200, 2, True),
    case("one segment", "delta", "bf16", 150, 1, True, d=128),
    case("carried memory", "linear", "bf16", 128, 1, False, d=128),
]


def name(case) -> str:
    return "-".join(str(value) for value in case.values())


def compute(case: dict, device: str) -> dict[str, list[float]]:
    """Errors of the kernels, and of the specification as PyTorch computes it in their type."""
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
    ours = plain.compute(op.infini_attention_triton, *arguments, dtype, torch.float32, device)
    torch.use_deterministic_algorithms(False)
    pytorch = plain.compute(infini_attention_reference, *arguments, dtype, dtype)
    return {"ours": _errors(exact, ours), "pytorch": _errors(exact, pytorch)}


def check(case: dict, result: dict[str, list[float]]) -> None:
    """Whether a result of `compute` is close enough."""
    precision = case["precision"]
    assert len(result["ours"]) == (len(plain.NAMES) if case["gated"] else len(plain.NAMES) - 1)
    for part, (what, ours, pytorchs) in enumerate(
        zip(plain.NAMES, result["ours"], result["pytorch"], strict=False)
    ):
        gradient = part >= OUTPUTS
        # A sum over all tokens whose terms largely cancel, in bf16 more than they round.
        slack = 3 if what == "gradient of beta" else 1
        assert ours <= slack * LIMITS[precision][gradient], what
        if precision == "bf16":
            # Norms are sums in fp32 by both: what is left there is their order.
            assert ours <= (3 if gradient else 2) * pytorchs + 1e-6, what


def _errors(expected: plain.Result, actual: plain.Result) -> list[float]:
    """Of outputs, then gradients, each as a share of the expected one's norm."""
    pairs = zip(expected, actual, strict=True)
    return [
        plain.error_ratio(want, have)
        for wants, haves in pairs
        for want, have in zip(wants, haves, strict=True)
    ]
