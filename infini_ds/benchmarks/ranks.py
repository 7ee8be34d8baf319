"""Starts a benchmark's command again, as several ranks of one thread each."""

import os
import subprocess
import sys

from infini_ds.errors import RunError


def is_rank() -> bool:
    """Whether `start` has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def start(count: int, name: str, arguments: list[str], limit: float) -> None:
    """Runs `infini-ds bench NAME ARGUMENTS` as `count` ranks.

    Args:
        limit: time limit in seconds.

    Raises:
        RunError: a rank failed, or they were not done in time.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), "-m", "infini_ds.cli", "bench", name, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        code = subprocess.run(command, env=environment, timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:
        raise RunError(f"bench {name}: not done after {limit:g} s") from None
    if code:
        raise RunError(f"bench {name}: a process failed with exit code {code}")


def end() -> None:
    """Ends a rank at once: threads of the process group may abort an orderly exit."""
    sys.stdout.flush()
    os._exit(0)
