"""Becomes one rank of a run, in a process that has imported everything: see `ForkedProcess`.

Given as globals: SCRIPT (with its arguments), LOG, ENVIRONMENT and CWD.
"""

import gc
import os
import runpy
import sys
from pathlib import Path

gc.freeze()  # what is imported is never garbage
os.setsid()
os.chdir(CWD)  # noqa: F821
os.environ.clear()
os.environ.update(ENVIRONMENT)  # noqa: F821
log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)  # noqa: F821
for stream in (1, 2):
    os.dup2(log, stream)
sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
sys.argv = SCRIPT  # noqa: F821
sys.path[:1] = [str(Path(SCRIPT[0]).parent), str(Path(__file__).parents[2])]  # noqa: F821
runpy.run_path(SCRIPT[0], run_name="__main__")  # noqa: F821
