"""Context parallelism: ranks that share their windows, and the exchange of memories among them.

Of each chunk, every rank of a group reads its part of the segments. What crosses from rank to rank
is the memory alone: each tells the others how its part changes it, whatever the part's length.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from infini_ds.memory.hand_on import Exchange, Message
from infini_ds.parallel.contact import Contact, settle


class ContextGroup(Contact, Exchange):
    """The ranks of one stage that share windows.

    Args:
        ranks: of the whole group, in the order of their parts.
        rank: this one.
        group: their process group.
        timeout: how long an exchange waits, in seconds.
    """

    def __init__(self, ranks: list[int], rank: int, group: dist.ProcessGroup, timeout: float):
        super().__init__(timeout)
        self.place, self.count = ranks.index(rank), len(ranks)
        self._others = [other for other in ranks if other != rank]
        self._group = group

    def all_gather(self, own: Tensor) -> Message:
        """See `Exchange`.

        Raises:
            WaitError: another rank did not come in time, or is gone; the message raises it too.
        """
        gathered = own.new_empty(self.count, *own.shape)
        with self._contact():
            work = dist.all_gather(list(gathered), own, group=self._group, async_op=True)

        def message() -> Tensor:
            self._finish(work, own)
            return gathered

        return message

    def sum_of_own(self, by_place: Tensor) -> Message:
        """See `Exchange`; the sum is taken in the order of places, so that it is always the same.

        Raises:
            WaitError: as in `all_gather`.
        """
        received = torch.empty_like(by_place)
        with self._contact():
            work = dist.all_to_all_single(received, by_place, group=self._group, async_op=True)

        def message() -> Tensor:
            self._finish(work, by_place[0])
            return received.sum(dim=0)

        return message

    def describe(self) -> str:
        """Names the exchange and the other ranks."""
        ranks = "rank" if len(self._others) == 1 else "ranks"
        return f"memories of {ranks} {', '.join(map(str, self._others))}"

    def connect(self) -> None:
        """Exchanges a first number, since NCCL connects ranks at their first message."""
        self.all_gather(torch.zeros(1, device=self._device))()
        self.sum_of_own(torch.zeros(self.count, 1, device=self._device))()
        self.sent_bytes = 0

    def _finish(self, work: dist.Work | None, message: Tensor) -> None:
        assert work is not None
        settle(self._device)  # only the time after this rank's own work is time spent waiting
        with self._contact():
            work.wait(self._limit)
        self.sent_bytes += (self.count - 1) * message.nbytes


def open_context(
    stages: list[list[int]], count: int, rank: int, timeout: float
) -> ContextGroup | None:
    """Connects this rank to those that it shares windows with; must be called on all ranks.

    Args:
        stages: the data-parallel ranks of each stage, in order.
        count: number of ranks that share windows; those with neighbouring indices do.
        timeout: how long an exchange waits, in seconds.

    Returns:
        None if each rank has windows of its own.
    """
    own = None
    if count == 1:
        return own
    for replicas in stages:
        for first in range(0, len(replicas), count):
            ranks = replicas[first : first + count]
            # This limit must be longer than the exchange's own, whose error says more.
            group = dist.new_group(ranks, timeout=timedelta(seconds=2 * timeout))
            if rank in ranks:
                assert isinstance(group, dist.ProcessGroup)
                own = ContextGroup(ranks, rank, group, timeout)
    assert own is not None
    own.connect()
    return own
