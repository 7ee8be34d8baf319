"""Checks on a device that the Triton kernels agree with PyTorch, before anything relies on them.

Kernels are compiled where they run, by whatever Triton and assembler are installed there, and some
versions of those generate wrong code without any error. Each kernel that will be used therefore
computes a small window twice, forward and backward. Its results must match those of PyTorch's
operators in fp32, and must be bit for bit the same both times. Kernels are compiled for the model's
own sizes, so that the check runs the same code as the model does later.

A fault may end the process (if the compiler aborts) or leave the device unusable (after an illegal
access). Where that would be costly, as in a run of many ranks, the check runs in a process of its
own, which executes this module.
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
from infini_ds.system.compute_type import DTYPES

LIMIT = 1e-2
"""Largest accepted `error`. In Triton's interpreter, at 24 to 272 tokens, rounding to bf16 (half a
unit is 2e-3) causes errors of 4e-3 in a result and, divided by ROW_SLACK, of 3e-3 in a row. A wrong
product causes 1e-1 or more, and one wrong number in a row of 128 causes 9e-2 in that row."""
BETA_SLACK = 3
"""Factor on LIMIT for the gradient of beta, a sum over all tokens whose terms largely cancel."""
TILE = 128
"""Size of the kernels' largest tile, in tokens."""

PROGRAM = __name__
"""Module that the checking process executes."""

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
    sliding: bool = False,
) -> Trial:
    """Makes a trial for which Triton compiles the same kernels as for these sizes.

    Its segments have two whole tiles and the beginning of a third, and a length that is a
    multiple of 16 if segment_length is one, because Triton specialises kernels for such numbers.
    """
    n = 2 * TILE + 16 + (segment_length % 16 > 0)
    return Trial(rule, heads, kv_heads, head_dim, n, dtype, packed, sliding)


def limit_of(name: str) -> float:
    """Returns the largest accepted `error` of a result by its name."""
    return LIMIT * (BETA_SLACK if name == "gradient of beta" else 1)


def find_fault(trial: Trial, device: torch.device | str, gradients: bool = True) -> str:
    """Describes the kernels' fault as a phrase that follows "triton"; empty if there is none."""
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
    except Exception as fault:  # compilers and devices fail in many ways
        return f"fails{where} ({_first_line(fault)})"
    return ""


def find_fault_apart(trial: Trial, device: torch.device | str, limit: float) -> str:
    """Runs `find_fault` in a process of its own, which leaves the kernels in Triton's cache.

    A packed trial is made without packing too, since a run that packs does not in its evaluations.
    This must be called before the calling process uses the device, because some devices admit only
    one process.

    Args:
        limit: time limit in seconds, half of train.timeout.
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


def check(q: Tensor, kv_heads: int, rule: str, packed: bool = False, sliding: bool = False) -> None:
    """Checks the kernels before their first use on a device, and distrusts them if they are wrong.

    Args:
        q: [batch, segments, n, heads, d], the queries that the kernels are about to receive.

    Raises:
        RunError: the kernels left the device unusable.
    """
    if is_recording():
        return
    _choose_assembler(q.device)
    if _settled or torch.cuda.is_current_stream_capturing():
        return
    dtype = "fp32" if q.dtype == torch.float32 else "bf16"
    trial = trial_of(rule, q.shape[3], kv_heads, q.shape[4], q.shape[2], dtype, packed, sliding)
    fault = _fault_here(trial, q.device, torch.is_grad_enabled())
    if fault:
        backend.distrust(fault)


def settle() -> None:
    """Ends all checking in this process, once it is decided what each device of a run uses."""
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
    # A thread of its own is free of this one's state, such as checkpointing's hooks and autocast.
    with ThreadPoolExecutor(1) as pool:
        fault = pool.submit(find_fault, trial, device, gradients).result()
    try:
        torch.cuda.synchronize(device)
    except Exception:  # after an illegal access, every use of the device raises
        raise RunError(
            f"kernels.backend: triton {fault}, and nothing can use it any more; start again with "
            "kernels.backend=torch, or on the CPU with CUDA_VISIBLE_DEVICES= before the command"
        ) from None
    return fault


@contextlib.contextmanager
def unwritten_memory_is_nan() -> Iterator[None]:
    """Fills new tensors with NaN, so that the check finds numbers that no kernel writes."""
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
    """Prints the result of `find_fault` as JSON in the last line; empty if there are no kernels.

    Args:
        arguments: the device, a Trial's fields, and a time limit in seconds.
    """
    device, rule, *sizes, dtype, packed, sliding, limit = arguments
    signal.alarm(int(float(limit)) + 1)  # the process that started this one may be gone
    heads, kv_heads, head_dim, n = map(int, sizes)
    kinds = (choice == str(True) for choice in (packed, sliding))
    trial = Trial(rule, heads, kv_heads, head_dim, n, dtype, *kinds)
    fault = ""
    if not backend.why_missing(torch.device(device).type, trial.head_dim):
        _choose_assembler(device)
        trials = [trial._replace(packed=False), trial] if trial.packed else [trial]
        fault = next(filter(None, (find_fault(each, device) for each in trials)), "")
    print(json.dumps(fault), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
