"""Calls of the Triton kernels that are compared with the specification, and how close they come."""

import torch

from infini_ds.config.model import KERNEL_RULES
from infini_ds.kernels.infini_attention.reference import infini_attention_reference
from infini_ds.kernels.infini_attention.triton import op, tuning
from infini_ds.kernels.infini_attention.triton import window as triton_window
from infini_ds.kernels.self_check import limit_of, unwritten_memory_is_nan
from infini_ds.kernels.trial import Trial, Window, error, make_layout, make_window, results
from infini_ds.memory import RULES
from tests.kernels import test_infini_attention as plain

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMITS = {"fp32": (1e-5, 1e-5), "bf16": (5e-3, 8e-3)}
OUTPUTS = 3  # output, kv, norm; gradients follow


def case(layout, rule, precision, n, group=1, gated=False, d=64, tile=None, alike=False):
    """tile: rows and columns of key_gradient, the others have rows >= columns; None: a GPU's.
    alike: whether all keys are nearly the same, which the gated delta rule's inverse must bear."""
    return {
        "layout": layout, "rule": rule, "precision": precision, "n": n, "group": group,
        "gated": gated, "d": d, "tile": tile, "alike": alike,
    }  # fmt: skip


_CASES = [
    # Every layout by all rules, with parts of tiles and tiles that end early.
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
        for rule in KERNEL_RULES
    ),
    case("padding", "linear", "fp32", 17, d=128),
    # Four blocks of 16 in a chunk, then two chunks.
    case("one segment", "gated_delta", "fp32", 100, tile=(64, 64), alike=True),
    # Small tiles, so that there are many, wider and higher ones; then those of a GPU.
    case("mid-window starts", "delta", "bf16", 40, 1, False, tile=(16, 32)),
    case("padding", "linear", "bf16", 40, 2, True, tile=(32, 16)),
    case("one segment", "linear", "bf16", 200, 2, True),
    case("one segment", "delta", "bf16", 150, 1, True, d=128),
    case("carried memory", "linear", "bf16", 128, 1, False, d=128),
    case("padding", "gated_delta", "bf16", 40, 2, True, tile=(32, 16)),
    case("one segment", "gated_delta", "bf16", 150, 1, True, d=128),
]


def _takes_long(case: dict) -> bool:
    """Whether `make test` leaves a case to `make test-long`: it has one or two of each rule."""
    return not (case["layout"] == "mid-window starts" or case["tile"] == (32, 16))


CASES = [case for case in _CASES if not _takes_long(case)]
LONG_CASES = [case for case in _CASES if _takes_long(case)]
TRIAL_CASES = [
    {"trial": trial, "tile": tile}
    for trial, tile in (
        (Trial("linear", 2, 2, 64, 7, "fp32", packed=True), None),
        (Trial("delta", 2, 1, 64, 75, "fp32", packed=True), (16, 32)),
        (Trial("linear", 1, 1, 64, 50, "bf16", packed=True), (32, 16)),
        (Trial("linear", 1, 1, 128, 140, "bf16", packed=True), None),
        (Trial("gated_delta", 2, 1, 64, 75, "fp32", packed=True), (16, 32)),
        (Trial("gated_delta", 1, 1, 64, 50, "bf16", packed=True), (32, 16)),
        (Trial("linear", 2, 1, 64, 40, "fp32", sliding=True), (16, 32)),
        (Trial("gated_delta", 2, 1, 64, 50, "fp32", packed=True, sliding=True), (32, 16)),
        (Trial("delta", 1, 1, 64, 50, "bf16", packed=True, sliding=True), (16, 32)),
        (Trial("gated_delta", 1, 1, 128, 75, "bf16", sliding=True), None),
    )
]
"""The first guests of the second segment begin and end inside tiles of all sizes."""
ONE_DOCUMENT = (0, 1, 2)
"""Lane, segment and document, a guest, whose gradient alone comes to a window."""


def name(case) -> str:
    return "-".join(str(value) for value in case.values())


def name_trial(case) -> str:
    return "-".join(str(value) for value in (*case["trial"], case["tile"]))


def _use_tiles(tile: tuple[int, int] | None) -> None:
    """Those of a case."""
    triton_window.tiles = tuning.tiles
    if tile:
        rows, columns = tile
        small = tuning.Tiles(max(rows, columns), min(rows, columns), 4, 1)
        of_keys = tuning.Tiles(rows, columns, 4, 1)
        triton_window.tiles = lambda kernel, *_: of_keys if kernel == "key_gradient" else small


def compute_trial(case: dict, device: str) -> dict[str, dict[str, float]]:
    """Errors of the kernels, and of those in fp32 how much gradient reaches anything else from one
    document's output."""
    _use_tiles(case["tile"])
    trial = Trial(*case["trial"])
    window = make_window(trial)
    call = (trial, window, device, DTYPES[trial.dtype])
    with unwritten_memory_is_nan():
        ours = results(op.infini_attention_triton, *call)
    exact = results(infini_attention_reference, trial, window, "cpu", torch.float64, torch.float64)
    errors = {what: error(wanted, ours[what].cpu()) for what, wanted in exact.items()}
    leaks = _leaks(trial, window, device) if trial.packed and trial.dtype == "fp32" else {}
    return {"errors": errors, "leaks": leaks}


def _leaks(trial: Trial, window: Window, device: str) -> dict[str, float]:
    lane, segment, document = ONE_DOCUMENT
    begins = make_layout(trial.segment_length, "cpu", packed=True).begins[lane, segment]
    inside = torch.zeros(2, 3, trial.segment_length, dtype=torch.bool)
    inside[lane, segment] = begins == begins.unique()[document]
    upstream = [torch.zeros_like(x) for x in window.upstream]
    upstream[0][inside] = window.upstream[0][inside]
    window = window._replace(upstream=upstream)
    found = results(op.infini_attention_triton, trial, window, device, DTYPES[trial.dtype])
    for what in ("q", "k", "v"):
        gradient = found[f"gradient of {what}"]
        assert gradient[inside].abs().sum() > 0
        gradient[inside] = 0
    return {what: x.abs().sum().item() for what, x in found.items() if "gradient" in what}


def check_trial(case: dict, result: dict[str, dict[str, float]]) -> None:
    """Whether a result of `compute_trial` is close enough."""
    trial = Trial(*case["trial"])
    for what, off in result["errors"].items():
        slack = limit_of(what) / limit_of("output")
        assert off <= slack * LIMITS[trial.dtype]["gradient" in what], what
    assert len(result["errors"]) == 10 + trial.sliding
    gradients = 7 + trial.sliding
    assert len(result["leaks"]) == (gradients if trial.packed and trial.dtype == "fp32" else 0)
    assert not any(result["leaks"].values())


def compute(case: dict, device: str) -> dict[str, list[float]]:
    """Errors of the kernels, and of the specification as PyTorch computes it in their type, if it
    can."""
    plain.DIM = case["d"]
    _use_tiles(case["tile"])
    layout = plain.make_layout(case["layout"], case["n"])
    inputs = plain.make_inputs(layout, case["n"], case["group"], case["gated"], case["rule"])
    if case["alike"]:
        inputs[1] = inputs[1][:, :, :1] + inputs[1] / 64
    rule, dtype = case["rule"], DTYPES[case["precision"]]
    arguments = (inputs, layout, rule)
    exact = plain.compute(infini_attention_reference, *arguments, torch.float64, torch.float64)
    # Memory that nothing was written to holds NaN.
    torch.use_deterministic_algorithms(True)
    ours = plain.compute(op.infini_attention_triton, *arguments, dtype, torch.float32, device)
    torch.use_deterministic_algorithms(False)
    errors = {"ours": _errors(exact, ours)}
    if dtype == torch.float32 or RULES[rule].divides:  # PyTorch solves no systems in bf16
        pytorch = plain.compute(infini_attention_reference, *arguments, dtype, dtype)
        errors["pytorch"] = _errors(exact, pytorch)
    return errors


def check(case: dict, result: dict[str, list[float]]) -> None:
    """Whether a result of `compute` is close enough."""
    precision = case["precision"]
    assert len(result["ours"]) == (len(plain.NAMES) if case["gated"] else len(plain.NAMES) - 1)
    pytorch = result.get("pytorch", [])
    assert pytorch or not RULES[case["rule"]].divides
    for part, (what, ours) in enumerate(zip(plain.NAMES, result["ours"], strict=False)):
        gradient = part >= OUTPUTS
        # A sum over all tokens whose terms largely cancel, in bf16 more than they round.
        slack = 3 if what == "gradient of beta" else 1
        assert ours <= slack * LIMITS[precision][gradient], what
        if precision == "bf16" and pytorch:
            # Norms are sums in fp32 by both: what is left there is their order.
            assert ours <= (3 if gradient else 2) * pytorch[part] + 1e-6, what


def _errors(expected: plain.Result, actual: plain.Result) -> list[float]:
    """Of outputs, then gradients, each as a share of the expected one's norm."""
    pairs = zip(expected, actual, strict=True)
    return [
        plain.error_ratio(want, have)
        for wants, haves in pairs
        for want, have in zip(wants, haves, strict=True)
    ]
