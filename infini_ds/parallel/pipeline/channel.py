"""A one-way connection between two stages: asynchronous, FIFO, with a limit on waiting."""

import torch
import torch.distributed as dist
from torch import Tensor

from infini_ds.parallel.contact import Contact, settle


class Channel(Contact):
    """Sends messages from one rank to another.

    Each channel has its own process group of these two ranks, because NCCL runs a rank's operations
    in a group strictly in order: a waiting message would hold up all others.
    """

    def __init__(self, name: str, peer: int, group: dist.ProcessGroup, timeout: float):
        super().__init__(timeout)
        self.name = name
        self.peer = peer
        self._group = group
        self._sends: list[tuple[dist.Work, Tensor]] = []

    def connect(self, sends: bool) -> None:
        """Sends or receives a first byte.

        NCCL connects two ranks at their first message and blocks each until the other arrives, so
        all ranks connect their channels in the same order before the first step.
        """
        if sends:
            self.send(torch.zeros(1, dtype=torch.uint8, device=self._device))
            self.flush()
            self.sent_bytes = 0
        else:
            self.receive(1)

    def send(self, message: Tensor) -> None:
        """Starts a send and keeps the message until it has left.

        Raises:
            WaitError: the other process is gone.
        """
        self._sends = [(work, kept) for work, kept in self._sends if not work.is_completed()]
        with self._contact():
            work = dist.isend(message, self.peer, group=self._group)
        assert work is not None
        self._sends.append((work, message))
        self.sent_bytes += message.nbytes

    def receive(self, size: int) -> Tensor:
        """Returns the next message, which has `size` bytes.

        The receive is posted only here. NCCL keeps the GPU busy with a posted receive, and whatever
        needs the whole GPU to be idle, such as freeing memory, would wait for it as well.

        Raises:
            WaitError: the message did not arrive in time, or the other process is gone.
        """
        message = torch.empty(size, dtype=torch.uint8, device=self._device)
        with self._contact():
            work = dist.irecv(message, self.peer, group=self._group)
        assert work is not None
        # Until this stage's own work is done, the message is not what delays it. Only the time
        # after that counts as waiting for the other rank.
        settle(self._device)
        with self._contact():
            work.wait(self._limit)
        return message

    def flush(self) -> None:
        """Waits until everything has left.

        Raises:
            WaitError: as in `receive`.
        """
        with self._contact():
            for work, _ in self._sends:
                work.wait(self._limit)
        self._sends.clear()

    def describe(self) -> str:
        """Names the messages of this channel and the other rank."""
        return f"{self.name} of rank {self.peer}"
