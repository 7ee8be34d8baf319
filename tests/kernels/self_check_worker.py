"""The self-check of kernels that are planted wrong, through Triton's interpreter.

`python -m tests.kernels.self_check_worker RESULTS.json` checks every PLANT, in this process;
with PLANT, the name of an ENDING, in the environment it is the program of `find_fault_apart`.
"""

import json
import os
import sys
import time
from pathlib import Path

from tests.kernels import interpreter  # noqa: F401  (before any kernel)

# isort: split
import torch

from infini_ds.kernels import backend, self_check
from infini_ds.kernels.infini_attention.triton import tuning
from infini_ds.kernels.infini_attention.triton import window as triton_window
from infini_ds.kernels.trial import Trial

LINEAR, DELTA = Trial("linear", 2, 1, 64, 12), Trial("delta", 2, 1, 64, 12)
PACKED = LINEAR._replace(packed=True)
# Two chunks of 16. The length also seeds the numbers; with others, the terms of beta's gradient may
# cancel so far that rounding is a fault.
GATED = Trial("gated_delta", 2, 1, 64, 22)
_interpreted = triton_window.launch
_known: dict[tuple, list[torch.Tensor]] = {}


def _launch(kernel, grid, options, **arguments):
    """As the interpreter does, but what it has already done once is copied."""
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    numbers = tuple(x for x in arguments.values() if not isinstance(x, torch.Tensor))
    key = kernel.__name__, grid, numbers, *(_bytes(x) for x in tensors)
    if key not in _known:
        _interpreted(kernel, grid, options, **arguments)
        _known[key] = [x.clone() for x in tensors]
    for x, result in zip(tensors, _known[key], strict=True):
        x.data.copy_(result)


def _bytes(x):
    return x.detach().contiguous().view(torch.uint8).numpy().tobytes()


def after(kernel, argument, change):
    """The kernel leaves something else in an argument."""

    def launch(started, grid, options, **arguments):
        _launch(started, grid, options, **arguments)
        if started.__name__ == kernel:
            change(arguments[argument])

    return launch


def before(kernel, argument, change):
    """The kernel takes an argument for something else."""

    def launch(started, grid, options, **arguments):
        if started.__name__ == kernel:
            arguments[argument] = change(arguments[argument])
        _launch(started, grid, options, **arguments)

    return launch


def fails(kernel, fault):
    """Starting the kernel raises."""

    def launch(started, grid, options, **arguments):
        if started.__name__ == kernel:
            raise fault
        _launch(started, grid, options, **arguments)

    return launch


def left_out(kernel):
    """The kernel never runs."""

    def launch(started, grid, options, **arguments):
        if started.__name__ != kernel:
            _launch(started, grid, options, **arguments)

    return launch


def moves(kernel, argument):
    """The kernel leaves another last bit of one number each time."""
    calls = iter(range(9))

    def change(x):
        x.view(-1)[3] += next(calls) * 2**-6 * x.view(-1)[3].abs()

    return after(kernel, argument, change)


def _add_one(x):
    x.view(-1)[5] += 1


def _zero(x):
    x.zero_()


def _nan(x):
    x.view(-1)[5] = float("nan")


ILLEGAL = RuntimeError(
    "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported at"
)


def _scaled(by, *index):
    return lambda x: x[index].mul_(by)


def _unit(inverses):
    inverses.copy_(torch.eye(inverses.shape[-1]))


PLANTS = {
    "nothing, linear": (LINEAR, False, _launch),
    "nothing, delta": (DELTA, True, _launch),
    "one number of the output": (LINEAR, False, after("attend_kernel", "out", _add_one)),
    "nan in the output": (LINEAR, False, after("attend_kernel", "out", _nan)),
    "rows that are not written": (LINEAR, False, left_out("attend_kernel")),
    "keys not rotated": (LINEAR, False, before("sums_kernel", "cos", torch.ones_like)),
    "a row of a memory": (LINEAR, False, after("sums_kernel", "kv", _scaled(1.5, 2, 0, 3))),
    "a norm": (LINEAR, False, after("sums_kernel", "norm", _scaled(1.5, 2, 0))),
    "documents not told apart": (LINEAR, False, before("scan_kernel", "starts", torch.zeros_like)),
    "overlap not taken away": (DELTA, False, after("overlap_kernel", "overlaps", _zero)),
    "guard left out": (DELTA, False, after("damping_kernel", "damping", lambda x: x.fill_(1))),
    "a row of a gradient": (
        LINEAR, True, after("key_gradient_kernel", "dk", _scaled(2, 0, 1, 2, 0))
    ),
    "a gradient a tenth too large": (
        LINEAR, True, after("write_gradient_kernel", "d_weight", lambda x: x.mul_(1.1))
    ),
    "gradient through another document": (
        DELTA, True, before("delta_gradient_kernel", "starts", torch.zeros_like)
    ),
    "nothing, gated delta": (GATED, True, _launch),
    "tokens of a chunk on their own": (GATED, False, after("keys_kernel", "inverses", _unit)),
    "overlap by the wrong side": (
        GATED, True, before("delta_gradient_kernel", "overlaps", lambda x: x.mT.contiguous())
    ),
    "a row of a chunk's gradient": (
        GATED, True, after("chunks_gradient_kernel", "d_by_chunk", _scaled(1.5, 2, 0, 0, 3))
    ),
    "nothing, packed": (PACKED, True, _launch),
    "neighbours seen": (PACKED, False, before("attend_kernel", "begins", torch.zeros_like)),
    "memory read by all": (
        PACKED, False, before("attend_kernel", "lengths", lambda x: torch.full_like(x, 12))
    ),
    "gradient from neighbours": (
        PACKED, True, before("key_gradient_kernel", "ends", lambda x: torch.full_like(x, 12))
    ),
    "an output that moves": (LINEAR, False, moves("attend_kernel", "out")),
    "illegal access": (LINEAR, False, fails("attend_kernel", ILLEGAL)),
    "compiler gives up": (
        LINEAR, False, fails("sums_kernel", ValueError("PassManager::run failed"))
    ),
}  # fmt: skip


def _small_tiles() -> None:
    square, wide = tuning.Tiles(16, 16, 4, 1), tuning.Tiles(16, 64, 4, 1)
    of_scores = ("attend", "normalized_attend", "query_gradient", "key_gradient")
    triton_window.tiles = lambda kernel, *_: square if kernel in of_scores else wide
    triton_window.READ_FEATURES = 64
    torch.set_num_threads(1)


def _check_all(path: str) -> None:
    found = {}
    for name, (trial, gradients, launch) in PLANTS.items():
        triton_window.launch = launch
        found[name] = self_check.find_fault(trial, "cpu", gradients)
        print(name, ":", found[name], flush=True)
    Path(path).write_text(json.dumps(found))


ENDINGS = {
    "right": _launch,
    "wrong": after("attend_kernel", "out", _add_one),
    "abort": lambda *_, **__: os.abort(),
    "hang": lambda *_, **__: time.sleep(60),
}


if __name__ == "__main__":
    _small_tiles()
    ending = os.environ.get("PLANT")
    if ending is None:
        _check_all(sys.argv[1])
    else:
        backend.why_missing = lambda *_: ""
        self_check._choose_assembler = lambda _: None
        triton_window.launch = ENDINGS[ending]
        self_check.main(sys.argv[1:])
