"""Errors while the processes of a run start: told once, and nobody is left waiting."""

import contextlib
import socket
from collections.abc import Iterator

import torch.distributed as dist

from infini_ds.errors import UserError


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Runs a part of the start that needs no other rank; if it fails on one it fails on all.

    Raises:
        UserError: what was wrong, with the ranks and hosts where, if not on all.
    """
    mine = None
    try:
        yield
    except UserError as error:
        mine = str(error), socket.gethostname()
    told: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    failed = {rank: each for rank, each in enumerate(told) if each}
    if not failed:
        return
    messages, hosts = zip(*failed.values(), strict=True)
    text = messages[0]
    if len(failed) < len(told):
        text += f" (rank {', '.join(map(str, failed))} on {', '.join(dict.fromkeys(hosts))})"
    raise UserError(text)
