"""One direction between two stages: asynchronous, first in first out, with a limit on waiting."""

import time
from collections import deque
from datetime import timedelta

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from infini_ds.errors import RunError


class WaitError(RunError):
    """Another process did not answer within train.timeout, or is gone."""


class Channel:
    """Messages from one rank to another.

    Each direction has a process group of its own: NCCL runs the messages of a group between two
    ranks strictly in order, so opposite directions in one group could wait for each other.
    """

    def __init__(self, name: str, peer: int, group: dist.ProcessGroup, timeout: float, ahead: int):
        self.name = name
        self.peer = peer
        self.seconds = 0.0
        """Time spent waiting so far."""
        self.sent_bytes = 0
        """Size of all messages sent so far."""
        self.waiting = False
        """Whether the other rank is being waited for."""
        self._group = group
        self._timeout = timeout
        self._ahead = ahead
        self._sends: list[tuple[dist.Work, Tensor]] = []
        self._receives: deque[tuple[dist.Work, Tensor]] = deque()
        self._expected: deque[int] = deque()
        self._device = torch.device(get_accelerator().current_device_name())

    def send(self, message: Tensor) -> None:
        """Starts to send; the message is kept until it has left."""
        self._sends = [(work, kept) for work, kept in self._sends if not work.is_completed()]
        self._sends.append((self._start(dist.isend, message), message))
        self.sent_bytes += message.nbytes

    def expect(self, sizes: list[int]) -> None:
        """Messages of these sizes in bytes will come; up to `ahead` of them are under way early."""
        self._expected.extend(sizes)
        self._post()

    def receive(self) -> Tensor:
        """The oldest expected message.

        Raises:
            WaitError: it did not arrive within the time limit, or the other process is gone.
        """
        work, message = self._receives.popleft()
        self._wait(work)
        self._post()
        return message

    def flush(self) -> None:
        """Waits until everything has left."""
        for work, _ in self._sends:
            self._wait(work)
        self._sends.clear()

    def _post(self) -> None:
        while self._expected and len(self._receives) < self._ahead:
            message = torch.empty(self._expected.popleft(), dtype=torch.uint8, device=self._device)
            self._receives.append((self._start(dist.irecv, message), message))

    def _start(self, operation, message: Tensor) -> dist.Work:
        try:
            work = operation(message, self.peer, group=self._group)
        except RuntimeError as error:
            raise self._failure(error) from None
        assert work is not None
        return work

    def _wait(self, work: dist.Work) -> None:
        begin = time.perf_counter()
        self.waiting = True
        try:
            work.wait(timedelta(seconds=self._timeout))
        except RuntimeError as error:
            raise self._failure(error) from None
        finally:
            self.waiting = False
            self.seconds += time.perf_counter() - begin

    def describe(self) -> str:
        """What comes or goes here, and whose it is."""
        return f"{self.name} of rank {self.peer}"

    def _failure(self, error: RuntimeError) -> WaitError:
        return WaitError(
            f"waited for {self.describe()} (at most train.timeout = "
            f"{self._timeout:g} s): {' '.join(str(error).split())}"
        )
