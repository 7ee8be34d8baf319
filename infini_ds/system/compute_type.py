"""Picks bf16 or fp32, whichever a device computes faster, for runs that leave the type open."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch
from torch import nn

from infini_ds.system.console import Console

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""The types of computation by their names in settings."""

_BEFORE_BF16 = {"sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core"}
_BEFORE_BF16 |= {"avx512_core_vnni"}
_BEFORE_AMX = {"avx512_core_bf16", "avx512_core_fp16", "avx10_1_512", "avx10_2_512"}
"""Values of ONEDNN_MAX_CPU_ISA that forbid AMX; those of _BEFORE_BF16 forbid all bf16."""
_CPUINFO = Path("/proc/cpuinfo")
_NAMES = ("flags", "Features")
"""Name of the line that lists the instruction sets, on x86 and on Arm."""


class ComputeType(NamedTuple):
    """A type, and the reason why it is the faster one."""

    dtype: Literal["bf16", "fp32"]
    why: str


def fastest_type(device: torch.device) -> ComputeType:
    """Returns the type in which a device of this machine multiplies matrices fastest."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return ComputeType("bf16", "the GPU has instructions for it")
        return ComputeType("fp32", "the GPU has no instructions for bf16")
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")
    onednn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return of_processor(_flags(), onednn, limit)


def of_processor(flags: Collection[str], onednn: bool, limit: str = "") -> ComputeType:
    """Returns the type in which a processor multiplies matrices fastest.

    With AVX-512 alone, oneDNN also computes bf16, but by conversion, which is several times slower
    than fp32. Xeons with AMX are slower in their other bf16 instructions than in fp32, which
    matters when a virtual machine hides AMX or a setting forbids it. The flag avx512_fp16
    distinguishes them from Cooper Lake and from AMD's processors, whose avx512_bf16 is twice as
    fast as fp32.

    Args:
        flags: instruction sets by their names in Linux's /proc/cpuinfo.
        onednn: whether PyTorch has a oneDNN that takes bf16; without it (macOS), fp32 is faster.
        limit: ONEDNN_MAX_CPU_ISA, the newest instructions that oneDNN may use; if empty, all.
    """
    forbidden = set()
    if limit.lower() in _BEFORE_BF16 | _BEFORE_AMX:
        forbidden |= {"amx_bf16"}
    if limit.lower() in _BEFORE_BF16:
        forbidden |= {"avx512_bf16"}
    usable = set(flags) - forbidden
    found = next((flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in usable), None)
    if found is None and forbidden.intersection(flags):
        return ComputeType("fp32", f"oneDNN is held to {limit}, which has no instructions for bf16")
    if found is None:
        return ComputeType("fp32", "the processor has no instructions for bf16")
    if found == "avx512_bf16" and "avx512_fp16" in usable:
        return ComputeType("fp32", "the processor is slower in bf16 without AMX")
    if not onednn:
        return ComputeType("fp32", f"this PyTorch does not use the processor's {found}")
    return ComputeType("bf16", f"the processor has instructions for it ({found})")


def device_at_hand() -> torch.device:
    """Returns the GPU if there is one, and otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def place(model: nn.Module, console: Console) -> torch.device:
    """Moves a model that is only read to the GPU, if there is one; reports a change of its type.

    On the CPU, bf16 weights become fp32, which holds them exactly, if that is faster and fits.
    """
    device = device_at_hand()
    weight = next(model.parameters())
    if weight.dtype == torch.bfloat16 and device.type == "cpu":
        fastest = fastest_type(device)
        size = sum(parameter.nbytes for parameter in model.parameters())
        if fastest.dtype == "fp32" and 4 * size < psutil.virtual_memory().available:
            model.float()
            console.print(f"weights in bf16, computes in fp32: {fastest.why}")
    model.to(device)
    return device


def _flags() -> set[str]:
    """Lists the processor's instruction sets; empty if the system has no /proc/cpuinfo."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return set()
    named = (line.partition(":") for line in lines)
    return next((set(text.split()) for name, _, text in named if name.strip() in _NAMES), set())
