"""The channels between the stages of a pipeline."""

from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from typing import NamedTuple

import torch.distributed as dist

from infini_ds.parallel.pipeline.channel import Channel


@dataclass
class Hops:
    """The channels from one stage to its neighbours; a pipeline's ends lack some of them."""

    to_next: Channel = None  # type: ignore[assignment]
    """Carries payloads to the next stage."""
    from_previous: Channel = None  # type: ignore[assignment]
    """Carries payloads from the previous stage."""
    gradient_from_next: Channel = None  # type: ignore[assignment]
    """Carries gradients of what was sent to the next stage."""
    gradient_to_previous: Channel = None  # type: ignore[assignment]
    """Carries gradients of what came from the previous stage."""
    returned: Channel = None  # type: ignore[assignment]
    """Carries memories from the last stage to the first; set on both of them."""
    channels: list[Channel] = field(default_factory=list)
    """All of the above that this rank has."""

    @property
    def seconds(self) -> float:
        """Time this rank has waited for other stages so far."""
        return sum(channel.seconds for channel in self.channels)

    @property
    def sent_bytes(self) -> int:
        """Bytes this rank has sent to other stages so far."""
        return sum(channel.sent_bytes for channel in self.channels)

    @property
    def waiting_for(self) -> str:
        """The message this rank is waiting for at the moment, and its sender; empty if none."""
        return next((channel.describe() for channel in self.channels if channel.waiting), "")

    def flush(self) -> None:
        """Waits until everything that was sent has left."""
        for channel in self.channels:
            channel.flush()


class _End(NamedTuple):
    stage: int
    rank: int


def open_hops(pipelines: list[list[int]], rank: int, timeout: float) -> Hops:
    """Connects this rank to its neighbouring stages; must be called on all ranks together.

    Every rank takes part in creating all groups, then connects its own one after another.

    Args:
        pipelines: the ranks of each pipeline, in the order of stages.
        timeout: how long a channel waits, in seconds.
    """
    hops = Hops()

    def opened(what: str, sender: _End, receiver: _End) -> Channel | None:
        channel = _open(what, sender, receiver, rank, timeout)
        hops.channels += [channel] if channel else []
        return channel

    for ranks in pipelines:
        stages = [_End(*end) for end in enumerate(ranks)]
        if len(stages) == 1:
            continue
        for here, there in pairwise(stages):
            channel = opened("activations", here, there)
            if channel and rank == here.rank:
                hops.to_next = channel
            elif channel:
                hops.from_previous = channel
        for here, there in pairwise(stages):
            channel = opened("gradients", there, here)
            if channel and rank == there.rank:
                hops.gradient_to_previous = channel
            elif channel:
                hops.gradient_from_next = channel
        if channel := opened("returned memories", stages[-1], stages[0]):
            hops.returned = channel
    return hops


def _open(what: str, sender: _End, receiver: _End, rank: int, timeout: float) -> Channel | None:
    """Opens a channel between two stages, if this rank is one of them."""
    # This limit must be longer than the channel's own, whose error says more.
    limit = timedelta(seconds=2 * timeout)
    group = dist.new_group([sender.rank, receiver.rank], timeout=limit)
    if rank not in (sender.rank, receiver.rank):
        return None
    assert isinstance(group, dist.ProcessGroup)
    other = receiver if rank == sender.rank else sender
    channel = Channel(f"{what} of stage {other.stage}", other.rank, group, timeout)
    channel.connect(sends=rank == sender.rank)
    return channel
