"""What the processes of a run say to each other outside of training; each is called by all."""

import contextlib
import socket
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch.distributed as dist

from infini_ds.errors import UserError

Value = TypeVar("Value")


def is_first_rank() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    return dist.get_rank() == 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size()


def shared(value: Value) -> Value:
    """The first rank's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Value) -> list[Value]:
    """Every rank's value, by rank, on every rank."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def share_of(items: Sequence[Value]) -> Sequence[Value]:
    """The items that are this rank's to work on, so that each is some rank's."""
    return items[dist.get_rank() :: dist.get_world_size()]


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
    told = gathered(mine)
    failed = {rank: each for rank, each in enumerate(told) if each}
    if not failed:
        return
    messages, hosts = zip(*failed.values(), strict=True)
    text = messages[0]
    if len(failed) < len(told):
        text += f" (rank {', '.join(map(str, failed))} on {', '.join(dict.fromkeys(hosts))})"
    raise UserError(text)
