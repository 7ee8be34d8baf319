"""One direction between two stages: asynchronous, first in first out, with a limit on waiting."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from infini_ds.errors import RunError
from infini_ds.system.causes import one_line

_ERRORS_OF_THE_DEVICE = (
    torch.OutOfMemoryError,
    getattr(torch, "AcceleratorError", torch.OutOfMemoryError),  # since torch 2.8
)
"""They may come to light in a call of communication."""


class WaitError(RunError):
    """Another process did not answer within train.timeout, or is gone."""


class Channel:
    """Messages from one rank to another.

    Each has a process group of its own, of these two ranks: NCCL runs what a rank does in a group
    strictly in order, so that a message that waits would hold up all others.
    """

    def __init__(self, name: str, peer: int, group: dist.ProcessGroup, timeout: float):
        self.name = name
        self.peer = peer
        self.seconds = 0.0
        """Time spent waiting so far."""
        self.sent_bytes = 0
        """Size of all messages sent so far, without that of `connect`."""
        self.waiting = False
        """Whether the other rank is being waited for."""
        self._group = group
        self._limit = timedelta(seconds=timeout)
        self._sends: list[tuple[dist.Work, Tensor]] = []
        self._device = torch.device(get_accelerator().current_device_name())

    def connect(self, sends: bool) -> None:
        """Sends or receives a first byte.

        NCCL connects two ranks at their first message, and holds both up until the other one is
        there as well: so all ranks connect their channels in one order, before the first step.
        """
        if sends:
            self.send(torch.zeros(1, dtype=torch.uint8, device=self._device))
            self.flush()
            self.sent_bytes = 0
        else:
            self.receive(1)

    def send(self, message: Tensor) -> None:
        """Starts to send; the message is kept until it has left.

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
        """The next message, of so many bytes.

        It is asked for only here. NCCL keeps the GPU busy with a message that is waited for, and
        what waits for the whole GPU, such as freeing memory, would wait for it as well.

        Raises:
            WaitError: it did not arrive within the time limit, or the other process is gone.
        """
        message = torch.empty(size, dtype=torch.uint8, device=self._device)
        with self._contact():
            work = dist.irecv(message, self.peer, group=self._group)
        assert work is not None
        # What comes has been asked for by the time that this stage's own work is done; only what
        # is waited for after that is a wait for the other rank.
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
        """What comes or goes here, and whose it is."""
        return f"{self.name} of rank {self.peer}"

    @contextmanager
    def _contact(self) -> Iterator[None]:
        begin = time.perf_counter()
        self.waiting = True
        try:
            yield
        except _ERRORS_OF_THE_DEVICE:
            raise
        except RuntimeError as error:
            raise WaitError(
                f"waited for {self.describe()} (at most train.timeout = "
                f"{self._limit.total_seconds():g} s): {one_line(error)}"
            ) from None
        finally:
            self.waiting = False
            self.seconds += time.perf_counter() - begin


def settle(device: torch.device) -> None:
    """Waits for what this process has given the device to compute, so that times are of its work.

    Not for messages that are on their way: a rank that waited for its sends before it receives
    could wait for ever.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
