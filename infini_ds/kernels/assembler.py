"""ptxas, the assembler that Triton's kernels go through: which one, and whether it is a right one.

Triton brings its own: 12.8 with 3.6 and 3.7, 13.4 for Hopper with 3.9. Those before 13.3 may reuse
registers that an asynchronous matrix product of Hopper has not read yet, and nothing tells that
results are wrong. pip brings a newer one as nvidia-cuda-nvcc.
"""

import importlib.metadata
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

HOPPER = 9
"""Major compute capability; `launch` has it too, and needs torch."""
RIGHT_ON_HOPPER = (13, 3)
PACKAGE = "nvidia-cuda-nvcc"
REMEDY = f"pip install '{PACKAGE}>={'.'.join(map(str, RIGHT_ON_HOPPER))}'"


class Ptxas(NamedTuple):
    """An assembler, for one compute capability."""

    version: str
    origin: str
    """Who brings it, or the variable that names it."""
    fault: str
    """What it is known to do wrong there; empty: nothing."""

    def __str__(self) -> str:
        return f"ptxas {self.version} ({self.origin})"

    @property
    def warning(self) -> str:
        """The fault and what to do about it, in one line; empty if there is none."""
        return f"{self} {self.fault}; {REMEDY}" if self.fault else ""


def choose_ptxas(capability: int) -> Ptxas:
    """The assembler of every kernel that this process compiles from now on.

    That is Triton's own; for Hopper a newer one that is installed as nvidia-cuda-nvcc; and what
    Triton's environment variable for it names, before both. To be called before the first kernel
    is compiled, as Triton remembers what it has found.

    Args:
        capability: compute capability, 90 for H100.
    """
    import triton
    from triton import knobs
    from triton.backends.nvidia import compiler

    blackwell = compiler.get_ptxas(capability).path == knobs.nvidia.ptxas_blackwell.path
    variable = "TRITON_PTXAS_BLACKWELL_PATH" if blackwell else "TRITON_PTXAS_PATH"
    packaged = _packaged() if capability // 10 == HOPPER else None
    path = compiler.get_ptxas(capability).path
    if packaged and variable not in os.environ and _newer(packaged, path):
        os.environ[variable] = path = packaged
    version = _version(path)
    origin = f"Triton {triton.__version__}"
    if path == packaged:
        origin = PACKAGE
    elif path == os.environ.get(variable):
        origin = variable
    fault = ""
    if capability // 10 == HOPPER and _numbers(version) < RIGHT_ON_HOPPER:
        fault = "may make wrong code for Hopper, as all before 13.3, and no error tells"
    return Ptxas(version, origin, fault)


def _packaged() -> str | None:
    """Where pip has put one that runs here."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = (str(Path(str(file.locate())).resolve()) for file in files if file.name == "ptxas")
    return next(filter(_version, paths), None)


def _version(path: str) -> str:
    """Empty if it does not run."""
    try:
        shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    found = re.search(r"\bV(\d+(?:\.\d+)+)", shown.stdout)
    return found[1] if found else ""


def _newer(path: str, other: str) -> bool:
    return _numbers(_version(path)) > _numbers(_version(other))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".") if number)
