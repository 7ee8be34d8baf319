"""Starts our process on a host: directly, over ssh, or as a step of a Slurm job."""

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
    """A command that ends when its input does, and a remedy if the host cannot be reached."""

    command: list[str]
    remedy: str = ""


def to_here() -> Way:
    """Returns the way to this host."""
    return Way([sys.executable, "-m", _MODULE])


def over_ssh(host: str) -> Way:
    """Returns the way to a host by its name for ssh, in the current directory there.

    Raises:
        UserError: there is no ssh here, or its options or variables cannot be read.
    """
    _require("ssh")
    # If an option is given twice, ssh uses the first one.
    given = words("PDSH_SSH_ARGS_APPEND", os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    ours = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}"]
    variables = [f"{name}={_as_launcher_writes(v)}" for name, v in _exported().items()]
    export = f"export {' '.join(variables)} && " if variables else ""
    program = shlex.join(to_here().command)
    there = f"cd {shlex.quote(str(Path.cwd()))} && {export}exec {program}"
    remedy = f"`ssh {host} true` must work without a password"
    return Way(["ssh", *given, *ours, host, there], remedy)


def over_srun(host: str) -> Way:
    """Returns the way to a node of this process's job, beside what already runs there.

    Raises:
        UserError: there is no srun here.
    """
    _require("srun")
    one = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", f"--nodelist={host}"]
    remedy = f"see `scontrol show node {host}`, or go without it: sbatch --exclude={host}"
    return Way(["srun", "--overlap", "--quiet", *one, *to_here().command], remedy)


def words(name: str, text: str) -> list[str]:
    """Splits a text as a shell does.

    Raises:
        UserError: it cannot be split; `name` says what the text is.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{name} ({text}): {str(error).lower()}") from None


def _require(program: str) -> None:
    if not shutil.which(program):
        raise UserError(f"{program}: no such program here, but the hosts are reached with it")


def _as_launcher_writes(value: str) -> str:
    """Quotes a value as DeepSpeed does for a shell, which still expands `$` in it."""
    return f'"{value.strip()}"' if re.search(r"[^\w@%+=:,./-]", value.strip()) else value.strip()


def _exported() -> dict[str, str]:
    """Returns the variables that DeepSpeed's launcher passes to the processes of each host."""
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
                        f"{file} line {number}: {line!r} must be NAME=VALUE; blank lines and "
                        "comments are not allowed either"
                    )
                exported[key] = value
    return exported
