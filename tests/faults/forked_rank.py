"""Becomes one rank of a run, in a process that has imported everything: see runs.ForkedRank.

Given as globals: ARGUMENTS (a script and its arguments), ENVIRONMENT (in addition), LOG.
"""

import os
import runpy
import sys

os.setsid()
os.environ.update(ENVIRONMENT)  # noqa: F821
log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)  # noqa: F821
for stream in (1, 2):
    os.dup2(log, stream)
sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
sys.argv = ARGUMENTS  # noqa: F821
runpy.run_path(ARGUMENTS[0], run_name="__main__")  # noqa: F821
