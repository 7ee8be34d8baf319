"""Communication of a run's processes outside of training; all ranks must make each call."""

import contextlib
import socket
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch.distributed as dist

from infini_ds.errors import UserError

Value = TypeVar("Value")


def is_first_rank() -> bool:
    """Returns whether this process is the one that writes and prints for all."""
    return dist.get_rank() == 0


def own_rank() -> int:
    """Returns this process's number among all."""
    return dist.get_rank()


def world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size()


def shared(value: Value) -> Value:
    """Returns the first rank's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Value) -> list[Value]:
    """Returns every rank's value, in the order of ranks, on every rank."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def share_of(items: Sequence[Value]) -> Sequence[Value]:
    """Returns this rank's share of the items; together the shares cover each item once."""
    return items[dist.get_rank() :: dist.get_world_size()]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Runs a local part of the start; if it fails on one rank, it fails on all.

    Raises:
        UserError: the message of the rank that failed, with ranks and hosts unless all failed.
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
