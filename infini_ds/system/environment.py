"""Handles the environment a process starts in: streams, encodings, limits, variables."""

import codecs
import contextlib
import io
import locale
import os
import resource
import sys

from infini_ds.errors import UserError

_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_NUMBERS = (*_OF_A_RANK, "LOCAL_SIZE", "MASTER_PORT")
_HIGHEST_PORT = 65535
_OPEN_FILES = 65536
_STARTERS = {
    "SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec",
}  # fmt: skip
"""Variables in which starters that do not inform PyTorch keep their number of processes."""
_REMEDY = "whatever starts several processes sets it for each; unset it for a single process"


def use_utf8() -> None:
    """Restarts this program in Python's UTF-8 mode if any of its encodings differs from UTF-8.

    Files, their names and arguments are then UTF-8. Python itself uses that mode by default from
    3.15 on, and before that if the locale is C or POSIX.
    """
    encodings = (sys.getfilesystemencoding(), locale.getpreferredencoding(False))
    if sys.flags.utf8_mode or all(codecs.lookup(name).name == "utf-8" for name in encodings):
        return
    os.environ["PYTHONUTF8"] = "1"  # for child processes
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def open_streams() -> None:
    """Opens standard streams that are closed, and lets the others write every character.

    The next opened file would otherwise take the place of a closed stream and receive what
    libraries print. Characters that an output's encoding lacks (PYTHONIOENCODING=ascii) are
    written as `\\xe9`.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def raise_file_limit() -> None:
    """Raises the limit on open files to its maximum, because every store and socket counts."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if most == resource.RLIM_INFINITY else min(most, _OPEN_FILES)
    if now != resource.RLIM_INFINITY and now < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS has a lower limit than it reports
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def forget_launcher() -> None:
    """Removes a launcher's variables, for commands that are always a single process."""
    for name in _OF_A_RANK:
        os.environ.pop(name, None)


def check_accelerator() -> None:
    """Checks that DeepSpeed and this program support the device that DS_ACCELERATOR names.

    Raises:
        UserError: the device is neither cpu nor cuda.
    """
    name = os.environ.get("DS_ACCELERATOR")
    if name not in (None, "cpu", "cuda"):
        raise UserError(
            f"environment variable DS_ACCELERATOR={name!r}: must be cpu or cuda; unset it for GPUs "
            "where there are any"
        )


def world_size() -> int:
    """Returns the number of processes that the launcher started.

    Raises:
        UserError: the launcher's variables are missing, no numbers, or contradict one another.
    """
    for name in _NUMBERS:
        value = os.environ.get(name, "0")
        if not value.isdecimal():
            raise UserError(f"environment variable {name}={value!r}: must be a number; {_REMEDY}")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    for name in ("RANK", "LOCAL_RANK"):
        rank = int(os.environ.get(name, "0"))
        if rank >= world:
            raise UserError(
                f"environment variable WORLD_SIZE={world}: must be above {name} ({rank}); {_REMEDY}"
            )
    missing = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if world > 1 and missing:
        raise UserError(
            f"environment variable WORLD_SIZE={world}: needs {', '.join(sorted(missing))} as well; "
            f"{_REMEDY}"
        )
    port = int(os.environ.get("MASTER_PORT", "0"))
    if port > _HIGHEST_PORT or (world > 1 and not port):
        raise UserError(
            f"environment variable MASTER_PORT={port}: must be the same port on all hosts, from 1 "
            f"to {_HIGHEST_PORT}"
        )
    if "RANK" not in os.environ:
        check_started_once()
    return world


def check_started_once() -> None:
    """Checks that several copies of this program, if any, have been told their ranks.

    Raises:
        UserError: they have not; each would train alone, and all write to the same place.
    """
    for name, starter in _STARTERS.items():
        count = os.environ.get(name, "1")
        if count.isdecimal() and int(count) > 1:
            raise UserError(
                f"environment variable {name}={count}: {starter} has started this {count} times, "
                "and nothing has set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for "
                "each; launch/pretrain.sbatch does it (or unset it for a single process)"
            )
