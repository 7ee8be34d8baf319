"""Waiting for other ranks: for how long so far, for at most how long, and what for."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from deepspeed.accelerator import get_accelerator

from infini_ds.errors import RunError
from infini_ds.system.causes import one_line

_ERRORS_OF_THE_DEVICE = (
    torch.OutOfMemoryError,
    getattr(torch, "AcceleratorError", torch.OutOfMemoryError),  # since torch 2.8
)
"""Errors of the device, which may surface during a communication call."""


class WaitError(RunError):
    """Another process did not answer within train.timeout, or is gone."""


class Contact:
    """A connection to other ranks, which limits and counts the time spent waiting for them.

    Args:
        timeout: how long to wait each time, in seconds.
    """

    def __init__(self, timeout: float):
        self.seconds = 0.0
        """Time spent waiting so far."""
        self.sent_bytes = 0
        """Bytes of all messages sent so far, not counting those that only connect the ranks."""
        self.waiting = False
        """Whether this rank is waiting for another one."""
        self._limit = timedelta(seconds=timeout)
        self._device = torch.device(get_accelerator().current_device_name())

    def describe(self) -> str:
        """Names what this rank waits for, and whose it is."""
        raise NotImplementedError

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
    """Waits until this process's own work on the device is done, so that times measure that work.

    It does not wait for messages on their way: a rank that waited for its sends before it receives
    could wait forever.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
