"""Says what a machine lacks that cannot compile C++ code."""

import shutil
import sysconfig
from pathlib import Path


def why_no_cpp(compiler: str) -> str:
    """Returns why a compiler cannot make modules of Python, after "as"; empty if nothing is amiss.

    Args:
        compiler: its name or path, without arguments.
    """
    headers = Path(sysconfig.get_path("include"))
    if not shutil.which(compiler):
        return f"as there is no C++ compiler {compiler} (apt-get install g++, or set CXX)"
    if not (headers / "Python.h").exists():
        return f"as {headers} has no Python.h (apt-get install python3-dev)"
    return ""
