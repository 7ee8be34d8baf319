"""Compares the kernels' results with the specification in fp64."""

import os
import time
from typing import NamedTuple

import torch

from infini_ds.benchmarks.gpu_check.results import Part
from infini_ds.benchmarks.kernels_timing import naive
from infini_ds.kernels.infini_attention.parallel import infini_attention_parallel
from infini_ds.kernels.infini_attention.reference import infini_attention_reference
from infini_ds.kernels.self_check import limit_of, unwritten_memory_is_nan
from infini_ds.kernels.trial import Operation, Trial, error, make_window, results

REPEATS = 10
"""Number of calls that must give the same results, bit by bit."""
CASES = (
    Trial("delta", 8, 2, 128, 2048),
    Trial("linear", 8, 2, 128, 512),
    Trial("delta", 2, 2, 128, 512),
    Trial("delta", 4, 2, 64, 500),
    Trial("linear", 2, 2, 64, 512),
    Trial("linear", 2, 2, 128, 1000),
    Trial("delta", 8, 2, 128, 2048, packed=True),
    Trial("linear", 4, 2, 64, 500, packed=True),
    Trial("gated_delta", 8, 2, 128, 2048),
    Trial("gated_delta", 2, 2, 128, 512),
    Trial("gated_delta", 4, 2, 64, 500, packed=True),
    Trial("gated_delta", 8, 2, 128, 2048, sliding=True),
    Trial("gated_delta", 4, 2, 64, 500, packed=True, sliding=True),
)


def ours(part: Part) -> Operation:
    """Returns the kernels, or their substitute on a CPU."""
    if part.tiny:
        return infini_attention_parallel
    from infini_ds.kernels.infini_attention.triton.op import infini_attention_triton

    return infini_attention_triton


class Verdict(NamedTuple):
    """The verdict on one case."""

    wrong: list[str]
    """Results with a larger error than `limit_of` allows."""
    moving: list[str]
    """Results that differ between calls."""

    def __str__(self) -> str:
        return "WRONG" if self.wrong else "MOVING" if self.moving else "ok"


def correct(part: Part, index: str) -> bool:
    """Checks one case; the error of PyTorch's naive bf16 version follows each in brackets."""
    trial = CASES[int(index)]
    if part.tiny:
        trial = trial._replace(head_dim=trial.head_dim // 4, segment_length=32)
    window = make_window(trial)
    call = (trial, window, part.device, torch.bfloat16)
    began = time.monotonic()
    repeats = int(os.environ.get("REPEATS", REPEATS))
    with unwritten_memory_is_nan():
        found = [results(ours(part), *call) for _ in range(repeats)]
    took = time.monotonic() - began
    exact = results(infini_attention_reference, *call[:3], torch.float64, torch.float64)
    plain = results(naive, *call)
    errors = {name: error(wanted, found[0][name]) for name, wanted in exact.items()}
    beside = {name: error(wanted, plain[name]) for name, wanted in exact.items()}
    verdict = Verdict(
        [name for name, off in errors.items() if off > limit_of(name)],
        [
            name for name, first in found[0].items()
            if any(not torch.equal(first, other[name]) for other in found[1:])
        ],
    )  # fmt: skip
    part.note(
        "correct", verdict=str(verdict), case=trial, **verdict._asdict(),
        errors={name: f"{off:.1e} ({beside[name]:.1e})" for name, off in errors.items()},
        seconds=round(took, 1), ptxas=os.environ.get("TRITON_PTXAS_PATH", ""),
    )  # fmt: skip
    return str(verdict) == "ok"
