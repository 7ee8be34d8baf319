"""How our part on a host is started: here, over ssh, or as a step of a Slurm job."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from infini_ds.errors import UserError

_MODULE = "infini_ds.cluster.preflight_host"
_CONNECT_SECONDS = 10


class Way(NamedTuple):
    """A command that ends when its input does, and what to do if the host cannot be reached."""

    command: list[str]
    remedy: str = ""


def to_here() -> Way:
    """To this host."""
    return Way([sys.executable, "-m", _MODULE])


def over_ssh(host: str) -> Way:
    """To a host by its name for ssh, in this directory.

    Raises:
        UserError: there is no ssh here, or what it is to be given cannot be read.
    """
    _require("ssh")
    # Ssh takes the first of options that are given twice.
    given = words("PDSH_SSH_ARGS_APPEND", os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    ours = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}"]
    variables = [f"{name}={_as_launcher_writes(v)}" for name, v in _exported().items()]
    export = f"export {' '.join(variables)} && " if variables else ""
    program = shlex.join(to_here().command)
    there = f"cd {shlex.quote(str(Path.cwd()))} && {export}exec {program}"
    remedy = f"`ssh {host} true` must work without a password"
    return Way(["ssh", *given, *ours, host, there], remedy)


def over_srun(host: str) -> Way:
    """To a node of the job that this process belongs to, beside what runs there.

    Raises:
        UserError: there is no srun here.
    """
    _require("srun")
    one = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", f"--nodelist={host}"]
    remedy = f"see `scontrol show node {host}`, or go without it: sbatch --exclude={host}"
    return Way(["srun", "--overlap", "--quiet", *one, *to_here().command], remedy)


def words(name: str, text: str) -> list[str]:
    """Of a text, as a shell splits it.

    Raises:
        UserError: it cannot be split; `name` says what it is.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{name} ({text}): {str(error).lower()}") from None


def _require(program: str) -> None:
    if not shutil.which(program):
        raise UserError(f"{program}: no such program here, and the hosts are reached by it")


def _as_launcher_writes(value: str) -> str:
    """The value of a variable as DeepSpeed writes it for a shell, which fills in `$` there."""
    return f'"{value.strip()}"' if re.search(r"[^\w@%+=:,./-]", value.strip()) else value.strip()


def _exported() -> dict[str, str]:
    """The variables that DeepSpeed's launcher gives to the processes of each host."""
    exported = {k: v for k, v in os.environ.items() if k.startswith(("PYTHON", "NCCL"))}
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for file in (Path(os.path.expanduser("~"), name), Path(name)):
        if file.is_file():
            try:
                lines = file.read_text().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                why = getattr(error, "strerror", "not text")
                raise UserError(f"{file}: cannot be read ({why})") from None
            for number, line in enumerate(lines, start=1):
                key, equals, value = line.partition("=")
                if not equals or not key.isidentifier():  # the launcher takes nothing else
                    raise UserError(
                        f"{file} line {number}: {line!r} must be NAME=VALUE (nor is there place "
                        "for blank lines and comments)"
                    )
                exported[key] = value
    return exported
