"""Errors while the processes of a run start: told once, and nobody is left waiting."""

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from infini_ds.errors import UserError


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Runs a part of the start that needs no other rank; if it fails on one it fails on all.

    Raises:
        UserError: what was wrong, with the ranks where, if not on all.
    """
    mine = None
    try:
        yield
    except UserError as error:
        mine = str(error)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, mine)
    failed = {rank: message for rank, message in enumerate(messages) if message}
    if not failed:
        return
    text = next(iter(failed.values()))
    if len(failed) < len(messages):
        text += f" (rank {', '.join(map(str, failed))})"
    raise UserError(text)
