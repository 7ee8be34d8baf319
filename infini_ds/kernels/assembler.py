"""Chooses ptxas, the assembler for Triton's kernels, and knows which versions are faulty.

Triton ships its own: 12.8 with Triton 3.6 and 3.7, and 13.4 for Hopper with Triton 3.9. Versions
before 13.3 may reuse registers that an asynchronous matrix product of Hopper has not read yet, so
that results are wrong without any error. A newer version can be installed with pip as
nvidia-cuda-nvcc.
"""

import importlib.metadata
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

HOPPER = 9
"""Major compute capability, repeated from `launch`, whose import would load torch."""
RIGHT_ON_HOPPER = (13, 3)
PACKAGE = "nvidia-cuda-nvcc"
REMEDY = f"pip install '{PACKAGE}>={'.'.join(map(str, RIGHT_ON_HOPPER))}'"


class Ptxas(NamedTuple):
    """An assembler as it is used for one compute capability."""

    version: str
    origin: str
    """The package that ships it, or the environment variable that names it."""
    fault: str
    """Its known fault for that compute capability; empty if there is none."""

    def __str__(self) -> str:
        return f"ptxas {self.version} ({self.origin})"

    @property
    def warning(self) -> str:
        """The fault and what to do about it, in one line; empty if there is none."""
        return f"{self} {self.fault}; {REMEDY}" if self.fault else ""


def choose_ptxas(capability: int) -> Ptxas:
    """Chooses the assembler for every kernel that this process compiles from now on.

    An assembler named by Triton's environment variable comes first, then for Hopper one installed
    as nvidia-cuda-nvcc if it is newer than Triton's, then Triton's own. This must be called before
    the first kernel is compiled, because Triton remembers the assembler it has found.

    Args:
        capability: compute capability, such as 90 for H100.
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
        fault = "may generate wrong code for Hopper without any error, like all before 13.3"
    return Ptxas(version, origin, fault)


def _packaged() -> str | None:
    """Returns the path of an assembler installed by pip that runs here, or None."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = (str(Path(str(file.locate())).resolve()) for file in files if file.name == "ptxas")
    return next(filter(_version, paths), None)


def _version(path: str) -> str:
    """Returns the version of an assembler, empty if it does not run."""
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
