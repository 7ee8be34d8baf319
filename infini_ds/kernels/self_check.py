"""Whether the Triton kernels compute on a device what PyTorch does, before anything relies on it.

Kernels are compiled where they run, by a Triton and an assembler that are not ours, and some
versions of those make wrong code without any error. So each kernel that is going to be used
computes a small window, forward and backward, twice: the results must be those of PyTorch's
operators in fp32, and the same bit for bit both times. The sizes that kernels are compiled for are
the model's own, so that what is compiled here is what runs later.

A fault may end the process (a compiler that aborts) or leave the device useless (an illegal
access). Where that would cost something, as in a run of many ranks, the check is a process of its
own, whose program this module is.
"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from infini_ds.errors import RunError
from infini_ds.kernels import backend
from infini_ds.kernels.assembler import choose_ptxas
from infini_ds.kernels.infini_attention.parallel import infini_attention_parallel
from infini_ds.kernels.launch import is_recording
from infini_ds.kernels.trial import Trial, error, make_window, results

LIMIT = 1e-2
"""Of `error`. By Triton's interpreter, at 24 to 272 tokens, roundings to bf16 (half a unit is 2e-3)
leave 4e-3 of a result and, divided by ROW_SLACK, 3e-3 of a row. A wrong product leaves 1e-1 and
more; one wrong number of a row of 128, 9e-2 of that row."""
BETA_SLACK = 3
"""The gradient of beta is a sum over all tokens whose terms largely cancel."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TILE = 128
"""The largest that kernels have, in tokens."""

PROGRAM = __name__
"""Of the process that checks."""

_PACKAGE = Path(__file__).parents[2]
_settled = False


def trial_of(
    rule: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    segment_length: int,
    dtype: str,
    packed: bool = False,
) -> Trial:
    """A window for which the kernels are compiled as for these sizes (Triton knows multiples of 16
    from other numbers): of two whole tiles and the beginning of a third."""
    n = 2 * TILE + 16 + (segment_length % 16 > 0)
    return Trial(rule, heads, kv_heads, head_dim, n, dtype, packed)


def limit_of(name: str) -> float:
    """Of the `error` of a result."""
    return LIMIT * (BETA_SLACK if name == "gradient of beta" else 1)


def find_fault(trial: Trial, device: torch.device | str, gradients: bool = True) -> str:
    """What the kernels do wrong, to come after "triton"; empty if nothing."""
    window = make_window(trial)
    arguments = (trial, window, device)
    where = f"{' in packed segments' if trial.packed else ''} on this device"
    expected = results(infini_attention_parallel, *arguments, torch.float32, gradients=gradients)
    try:
        from infini_ds.kernels.infini_attention.triton.op import infini_attention_triton

        compute = functools.partial(
            results, infini_attention_triton, *arguments, DTYPES[trial.dtype], gradients=gradients
        )
        with unwritten_memory_is_nan():
            first = compute()
            for name, wanted in expected.items():
                off = error(wanted, first[name])
                if off > limit_of(name):
                    return f"computes the {name} wrongly{where}, by {off:.1e} of its size"
            second = compute()
            for name in expected:
                if not torch.equal(first[name], second[name]):
                    return f"does not compute the same {name} twice{where}"
    except Exception as fault:  # of any kind: compilers and devices have many
        return f"fails{where} ({_first_line(fault)})"
    return ""


def find_fault_apart(trial: Trial, device: torch.device | str, limit: float) -> str:
    """The same in a process of its own; the kernels stay in Triton's cache.

    Of a packed trial also without packing, as a run that packs does not in its evaluations. Before
    this process uses the device: some allow one process alone.

    Args:
        limit: seconds for it, half of train.timeout.
    """
    command = [sys.executable, "-m", PROGRAM, str(device), *map(str, trial), f"{limit:g}"]
    path = os.pathsep.join((str(_PACKAGE), os.environ.get("PYTHONPATH", "")))
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit,
            start_new_session=True, check=False, errors="replace",
            env=os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"does not end a check on this device within half of train.timeout, {limit:g} s"
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    said = done.stderr.strip().splitlines()
    ending = ": ".join((_ending(done.returncode), *(line[:300] for line in said[-1:])))
    return f"ends its process on this device ({ending})"


def check(q: Tensor, kv_heads: int, rule: str, packed: bool = False) -> None:
    """Before the kernels are used for the first time on a device: those that are wrong count as
    missing from then on.

    Args:
        q: [batch, segments, n, heads, d], as they are going to be computed.

    Raises:
        RunError: nothing can use the device any more.
    """
    if is_recording():
        return
    _choose_assembler(q.device)
    if _settled or torch.cuda.is_current_stream_capturing():
        return
    dtype = "fp32" if q.dtype == torch.float32 else "bf16"
    trial = trial_of(rule, q.shape[3], kv_heads, q.shape[4], q.shape[2], dtype, packed)
    fault = _fault_here(trial, q.device, torch.is_grad_enabled())
    if fault:
        backend.distrust(fault)


def settle() -> None:
    """It is known of all devices of a run what to do: nothing is checked any more."""
    global _settled
    _settled = True


@functools.cache
def _choose_assembler(device: torch.device | str) -> None:
    major, minor = torch.cuda.get_device_capability(device)
    warning = choose_ptxas(10 * major + minor).warning
    if warning:
        warnings.warn(warning, stacklevel=2)


@functools.cache
def _fault_here(trial: Trial, device: torch.device, gradients: bool) -> str:
    # A thread of its own has no part in what this one does: checkpointing's hooks, autocast.
    with ThreadPoolExecutor(1) as pool:
        fault = pool.submit(find_fault, trial, device, gradients).result()
    try:
        torch.cuda.synchronize(device)
    except Exception:  # an illegal access is told again by whatever uses the device
        raise RunError(
            f"kernels.backend: triton {fault}, and nothing can use it any more; start again with "
            "kernels.backend=torch, or on the CPU with CUDA_VISIBLE_DEVICES= before the command"
        ) from None
    return fault


@contextlib.contextmanager
def unwritten_memory_is_nan() -> Iterator[None]:
    """Inside it new tensors are filled with NaN, so that what nobody writes is told."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)


def _first_line(fault: Exception) -> str:
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return f"{type(fault).__name__}: {lines[0] if lines else ''}"[:300]


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def main(arguments: list[str]) -> None:
    """Prints what `find_fault` says as JSON, in the last line; nothing where there are no kernels.

    Args:
        arguments: the device, a Trial's fields, and after how many seconds to end at the latest.
    """
    device, rule, *sizes, dtype, packed, limit = arguments
    signal.alarm(int(float(limit)) + 1)  # of whoever started it there may be nothing left
    heads, kv_heads, head_dim, n = map(int, sizes)
    trial = Trial(rule, heads, kv_heads, head_dim, n, dtype, packed == str(True))
    fault = ""
    if not backend.why_missing(torch.device(device).type, trial.head_dim):
        _choose_assembler(device)
        trials = [trial._replace(packed=False), trial] if trial.packed else [trial]
        fault = next(filter(None, (find_fault(each, device) for each in trials)), "")
    print(json.dumps(fault), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
