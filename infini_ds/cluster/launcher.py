"""Checks what DeepSpeed's launcher does not check, in the ranks it starts or before it starts.

Commands for other hosts pass through pdsh, which replaces `%h` and the like, and a shell there. The
launcher does not quote them for either.
"""

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from urllib.parse import quote, unquote

import psutil

from infini_ds.cluster.hostfile import read_hostfile
from infini_ds.errors import UserError

_QUOTED = "--percent-encoded"
_OF_RUN = ("--world_info=", "--master_addr=", "--master_port=")
"""Prefixes of the launcher's arguments that identify a run on each host."""
_PDSH = ("pdsh", "pdsh.bin")
"""pdsh on Debian starts pdsh.bin."""
_EXPORTED = ("MLFLOW", "MV2", "NCCL", "PYTHON", "UCX")
"""Prefixes of the variables that the launcher passes to other hosts."""
_CHANGED = re.compile(r"""[$`"\\]|%[%hnu]""")
"""Text that changes between the double quotes that the launcher puts around variables' values."""


def quoted(arguments: Sequence[str]) -> list[str]:
    """Encodes a script's arguments so that pdsh and a shell leave them alone; see `unquoted`."""
    words = (quote(word, safe="/=.,:@+", errors="surrogateescape") for word in arguments)
    return [_QUOTED, *(word.replace("~", "%7E") for word in words)]


def unquoted(arguments: Sequence[str]) -> list[str]:
    """Returns a script's arguments as they were typed."""
    if _QUOTED not in arguments:
        return [*arguments]
    words = (word for word in arguments if word != _QUOTED)
    return [unquote(word, errors="surrogateescape") for word in words]


def check_what_is_not_quoted(script: str) -> None:
    """Checks, before a start on several hosts, the words that `quoted` cannot protect.

    Raises:
        UserError: a path or a variable would be changed on its way.
    """
    for what, path in (
        ("the directory", os.getcwd()), ("the script", script), ("Python", sys.executable),
    ):  # fmt: skip
        if odd := re.search(r"[^\w@+=:,./-]", path):
            raise UserError(
                f"--hostfile: {what} {path!r} has {odd[0]!r}, which DeepSpeed's launcher "
                "changes on the way to other hosts; use one without it"
            )
    for name, value in os.environ.items():
        if name.startswith(_EXPORTED) and (odd := _CHANGED.search(value)):
            raise UserError(
                f"--hostfile: environment variable {name} ({value}) has {odd[0]!r}, which "
                "DeepSpeed's launcher changes on the way to other hosts; unset it, or set it there"
            )


def check_arguments_of_launcher() -> None:
    """Checks, in a rank, that its arguments match those typed after `deepspeed --hostfile FILE`.

    Raises:
        UserError: pdsh or a shell has changed an argument.
    """
    script, *arrived = (word for word in sys.argv if not word.startswith("--local_rank"))
    for typed in _typed(script):
        if typed != arrived:
            pairs = itertools.zip_longest(typed, arrived)
            before, after = next(pair for pair in pairs if pair[0] != pair[1])
            raise UserError(
                f"{before!r} was typed, but DeepSpeed's launcher and ssh made it {after!r}; use "
                "`bash launch/pretrain.sh --hostfile HOSTS CONFIG ...`, which quotes it"
            )


def _typed(script: str) -> Iterator[list[str]]:
    """Yields what was typed after the script's name, if pdsh is used and runs on this host."""
    ours = {word for words in _commands_above() for word in words if word.startswith(_OF_RUN)}
    for process in psutil.process_iter() if ours else ():
        with contextlib.suppress(psutil.Error, ValueError):
            if process.name() in _PDSH and ours <= {*process.cmdline()}:
                launcher = process.parent()
                words = launcher.cmdline() if launcher else []
                yield words[words.index(script) + 1 :]


def _commands_above() -> Iterator[list[str]]:
    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            yield process.cmdline()


def check_hostfile_of_launcher() -> None:
    """Checks, in a rank on the launcher's host, the file given to `deepspeed --hostfile FILE`.

    If the file is missing, DeepSpeed only warns, and trains on this host alone.

    Raises:
        UserError: it is not a valid hostfile.
    """
    for words in _commands_above():
        if any(word.endswith("/deepspeed") for word in words[:2]):
            for hostfile in _hostfiles(words):
                read_hostfile(hostfile)


def _hostfiles(words: list[str]) -> Iterator[str]:
    for word, following in itertools.pairwise([*words, ""]):
        if word in ("-H", "--hostfile"):
            yield following
        elif word.startswith("--hostfile="):
            yield word.partition("=")[2]
