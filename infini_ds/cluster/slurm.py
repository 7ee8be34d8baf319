"""The nodes of the Slurm job that this process belongs to."""

import os
import re
import subprocess

from infini_ds.errors import UserError
from infini_ds.system.causes import one_line


def nodes_of_job() -> dict[str, int]:
    """Returns the number of tasks of each node, in the order of the ranks; {} outside of a job.

    Raises:
        UserError: Slurm's variables do not give these numbers.
    """
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return {}
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise UserError(
            f"environment variable SLURM_JOB_NODELIST={nodes!r}: `scontrol show hostnames` fails "
            f"({one_line(said)}); unset it outside of a Slurm job"
        ) from None
    names = done.stdout.split()
    tasks = os.environ.get("SLURM_TASKS_PER_NODE", f"1(x{len(names)})")
    counts = tasks_per_node(tasks)
    if len(counts) != len(names):
        raise UserError(
            f"SLURM_TASKS_PER_NODE ({tasks}): describes {len(counts)} nodes, but "
            f"SLURM_JOB_NODELIST ({nodes}) names {len(names)}"
        )
    return dict(zip(names, counts, strict=True))


def tasks_per_node(text: str) -> list[int]:
    """Expands a variable such as `8(x2),4` to [8, 8, 4]."""
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(number)] * int(times or 1)
    return counts
