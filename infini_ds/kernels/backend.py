"""Chooses the kernels: Triton's on GPUs that they support, PyTorch's operators elsewhere."""

import functools
import importlib.util
import os
import shutil
import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from infini_ds.errors import UserError
from infini_ds.kernels.assembler import choose_ptxas
from infini_ds.kernels.launch import is_recording

Backend = Literal["auto", "torch", "triton"]

TRITON_HEAD_DIMS = (64, 128)
"""Head sizes for which the Triton kernels are written."""

OLDEST_TRITON = (3, 6)
"""The oldest version that the kernels are tested with."""

_backend: Backend = "auto"
_fault = ""


def use_backend(backend: Backend) -> None:
    """Sets the backend of the whole process, as `kernels.backend` of the config says."""
    global _backend
    _backend = backend


def distrust(fault: str) -> None:
    """Treats the Triton kernels as missing in this process from now on, and compiles nothing.

    Args:
        fault: the fault of the kernels, as a phrase that follows "triton"; empty to trust them
            again.
    """
    global _fault
    _fault = fault


def check_backend(backend: Backend, device: str, head_dim: int) -> None:
    """Checks that a backend can compute on a type of device, before anything is computed.

    Raises:
        UserError: the Triton kernels are asked for and cannot compute there.
    """
    missing = _fault or why_missing(device, head_dim)
    if missing and backend == "triton":
        raise _refused(missing)


def compiles(x: Tensor) -> bool:
    """Returns whether TorchInductor compiles chains of operators on a tensor to kernels."""
    return _backend != "torch" and x.is_cuda and not why_not_compiled()


def why_not_compiled() -> str:
    """Returns why nothing is compiled for GPUs, as a phrase that follows "triton"; else empty."""
    return _fault or _cannot_run()


def uses_triton(q: Tensor) -> bool:
    """Returns whether queries [..., d] go through the Triton kernels.

    With `auto` they do so on a CUDA device, in bf16, for the head sizes in TRITON_HEAD_DIMS, if
    Triton is installed. A warning names once what is missing.

    Raises:
        UserError: the Triton kernels are asked for and cannot compute this.
    """
    if is_recording():  # the kernels are compiled for a GPU that need not be present
        fits = q.dtype == torch.bfloat16 and q.shape[-1] in TRITON_HEAD_DIMS
        return fits and importlib.util.find_spec("triton") is not None
    if _backend == "torch" or (
        _backend == "auto" and not (q.is_cuda and q.dtype == torch.bfloat16)
    ):
        return False
    missing = _fault or why_missing(q.device.type, q.shape[-1])
    if missing and _backend == "triton":
        raise _refused(missing)
    if missing:
        _warn(f"kernels.backend: triton {missing}; PyTorch's operators compute instead")
    return not missing


@functools.cache  # every layer asks
def why_missing(device: str, head_dim: int) -> str:
    """Returns why a type of device and a head size have no Triton kernels; empty if they have."""
    if device != "cuda":
        return f"needs a CUDA device, not {device}"
    if head_dim not in TRITON_HEAD_DIMS:
        return f"has kernels for model.head_dim 64 and 128, not {head_dim}"
    return _cannot_run()


@functools.cache
def _cannot_run() -> str:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    if importlib.util.find_spec("triton") is None:
        return "is not installed (pip install triton)"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "needs a C compiler, gcc or clang"
    if fault := _variable_in_the_way():
        return fault
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"needs version {oldest} or newer, not {triton.__version__}"
    if torch.cuda.is_available():
        # This has to come before the first kernel is compiled, even one of TorchInductor's.
        major, minor = torch.cuda.get_device_capability()
        if fault := choose_ptxas(10 * major + minor).warning:
            _warn(f"kernels.backend: {fault}")
    return ""


def _variable_in_the_way() -> str:
    """Returns one line on an environment variable that stops Triton; empty if none does."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off"):
        return "would interpret its kernels, as TRITON_INTERPRET says; unset it"
    assembler = os.environ.get("TRITON_PTXAS_PATH")
    if assembler and not os.access(assembler, os.X_OK):  # Triton would silently take another
        return f"finds no program at TRITON_PTXAS_PATH={assembler}; correct or unset it"
    home = os.environ.get("TRITON_HOME", os.path.expanduser("~/"))
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache"))
    there = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        return f"cannot write {cache}; set TRITON_CACHE_DIR to a directory of yours"
    return ""


def _refused(missing: str) -> UserError:
    return UserError(f"kernels.backend: triton {missing}; auto or torch computes it")


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
