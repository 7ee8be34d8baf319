"""What DeepSpeed's launcher does not see to: checked in the ranks it starts, or before it starts.

To other hosts its command goes through pdsh, which fills in `%h`, and a shell there, without the
quotes that both would need.
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
"""Beginnings of words that tell a run from others, as the launcher has them on each host."""
_PDSH = ("pdsh", "pdsh.bin")
"""The second one is Debian's, which the first one starts."""
_EXPORTED = ("MLFLOW", "MV2", "NCCL", "PYTHON", "UCX")
"""Beginnings of the variables that the launcher gives to other hosts."""
_CHANGED = re.compile(r"""[$`"\\]|%[%hnu]""")
"""What is not itself between the double quotes that it puts around their values."""


def quoted(arguments: Sequence[str]) -> list[str]:
    """A script's arguments in words that are the same behind pdsh and a shell; for `unquoted`."""
    words = (quote(word, safe="/=.,:@+", errors="surrogateescape") for word in arguments)
    return [_QUOTED, *(word.replace("~", "%7E") for word in words)]


def unquoted(arguments: Sequence[str]) -> list[str]:
    """A script's arguments as they were typed."""
    if _QUOTED not in arguments:
        return [*arguments]
    words = (word for word in arguments if word != _QUOTED)
    return [unquote(word, errors="surrogateescape") for word in words]


def check_what_is_not_quoted(script: str) -> None:
    """Before the launcher starts on several hosts: what `quoted` cannot see to arrives as it is.

    Raises:
        UserError: a path or a variable would be changed on its way.
    """
    for what, path in (
        ("the directory", os.getcwd()), ("the script", script), ("Python", sys.executable),
    ):  # fmt: skip
        if odd := re.search(r"[^\w@+=:,./-]", path):
            raise UserError(
                f"--hostfile: {what} {path!r} has {odd[0]!r}, which DeepSpeed's launcher does not "
                "hand to other hosts as it is; use one without"
            )
    for name, value in os.environ.items():
        if name.startswith(_EXPORTED) and (odd := _CHANGED.search(value)):
            raise UserError(
                f"--hostfile: environment variable {name} ({value}) has {odd[0]!r}, which "
                "DeepSpeed's launcher does not hand to other hosts as it is; unset it, or set it "
                "there"
            )


def check_arguments_of_launcher() -> None:
    """In a rank: its arguments are those that `deepspeed --hostfile FILE` was given on this host.

    Raises:
        UserError: pdsh or a shell has changed one.
    """
    script, *arrived = (word for word in sys.argv if not word.startswith("--local_rank"))
    for typed in _typed(script):
        if typed != arrived:
            pairs = itertools.zip_longest(typed, arrived)
            before, after = next(pair for pair in pairs if pair[0] != pair[1])
            raise UserError(
                f"{before!r} was typed, and is {after!r} behind DeepSpeed's launcher and ssh; use "
                "`bash launch/pretrain.sh --hostfile HOSTS CONFIG ...`, which quotes it"
            )


def _typed(script: str) -> Iterator[list[str]]:
    """What was typed behind the script's name, where this is the host of pdsh, if that is used."""
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
    """In a rank: the hostfile that `deepspeed --hostfile FILE` was given on this host is one.

    Where it is missing DeepSpeed only warns, and trains on this host alone.

    Raises:
        UserError: it is not.
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
