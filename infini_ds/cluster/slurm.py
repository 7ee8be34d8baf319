"""Asks Slurm about the job that this process belongs to."""

import os
import re
import subprocess
from dataclasses import dataclass

from infini_ds.errors import UserError
from infini_ds.system.causes import one_line

LIMIT_SECONDS = 60.0
"""Time limit for an answer. Slurm itself gives up on a message after 10 seconds, and retries."""


class SlurmError(Exception):
    """Slurm cannot do what it is asked to do; the message says why in one line."""


def scontrol(*arguments: str) -> str:
    """Runs scontrol with these arguments and returns its output.

    Raises:
        SlurmError: the command fails, or does not end in time.
    """
    try:
        done = subprocess.run(
            ["scontrol", *arguments], capture_output=True, text=True, errors="replace",
            check=True, timeout=LIMIT_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise SlurmError(f"no answer within {LIMIT_SECONDS:g} s") from None
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise SlurmError(one_line(said)) from None
    return done.stdout


@dataclass(frozen=True)
class JobState:
    """The state of a job according to Slurm; the defaults are for when Slurm does not tell it."""

    name: str = ""
    """Name of the state, such as RUNNING, CANCELLED or COMPLETING."""
    preempted: bool = False
    """Whether a more urgent job takes the nodes of this one."""

    @property
    def running(self) -> bool:
        return self.name == "RUNNING"


def state_of_job(job: str) -> JobState:
    """Returns the state of a job.

    Raises:
        SlurmError: Slurm does not tell the state.
    """
    fields: dict[str, str] = {}
    for name, value in re.findall(r"(\w+)=(\S*)", scontrol("show", "job", job)):
        fields.setdefault(name, value)  # text by the user, such as the command, comes later
    preempted = fields.get("PreemptTime", "None") not in ("", "None")
    return JobState(fields.get("JobState", ""), preempted)


def nodes_of_job() -> dict[str, int]:
    """Returns the number of tasks of each node, in the order of the ranks; {} outside of a job.

    Raises:
        UserError: Slurm's variables do not give these numbers.
    """
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return {}
    try:
        names = scontrol("show", "hostnames", nodes).split()
    except SlurmError as error:
        raise UserError(
            f"environment variable SLURM_JOB_NODELIST={nodes!r}: `scontrol show hostnames` fails "
            f"({error}); unset it outside of a Slurm job"
        ) from None
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
