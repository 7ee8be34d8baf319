"""What DeepSpeed's launcher does not check of its own options, checked in the ranks it starts."""

import contextlib
import itertools
from collections.abc import Iterator

import psutil

from infini_ds.cluster.hostfile import read_hostfile


def check_hostfile_of_launcher() -> None:
    """In a rank: the hostfile that `deepspeed --hostfile FILE` was given on this host is one.

    Where it is missing DeepSpeed only warns, and trains on this host alone.

    Raises:
        UserError: it is not.
    """
    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if any(word.endswith("/deepspeed") for word in words[:2]):
                for hostfile in _hostfiles(words):
                    read_hostfile(hostfile)


def _hostfiles(words: list[str]) -> Iterator[str]:
    for word, following in itertools.pairwise([*words, ""]):
        if word in ("-H", "--hostfile"):
            yield following
        elif word.startswith("--hostfile="):
            yield word.partition("=")[2]
