"""Ranks that share windows, simulated by the threads of one process."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from infini_ds.memory.hand_on import Exchange, Message

LIMIT = 60.0
"""Seconds that a part waits for the others."""


class Meeting:
    """Where the parts put down what the others take."""

    def __init__(self, count: int):
        self.count = count
        self.barrier = threading.Barrier(count, timeout=LIMIT)
        self.table: list = [None] * count

    def swap(self, place: int, own: Tensor) -> list[Tensor]:
        self.table[place] = own
        self.barrier.wait()
        everything = list(self.table)
        self.barrier.wait()
        return everything


class Part(Exchange):
    """One part's exchange; it counts what it did."""

    def __init__(self, meeting: Meeting, place: int):
        self.place, self.count = place, meeting.count
        self.sent: list[int] = []
        """Numbers of each message to each other part, forward."""
        self.sent_back: list[int] = []
        """The same of gradients."""
        self._meeting = meeting

    def all_gather(self, own: Tensor) -> Message:
        self.sent.append(own.numel())
        own = own.detach().clone()
        return lambda: torch.stack(self._meeting.swap(self.place, own))

    def sum_of_own(self, by_place: Tensor) -> Message:
        self.sent_back.append(by_place[0].numel())
        return lambda: torch.stack(
            [each[self.place] for each in self._meeting.swap(self.place, by_place)]
        ).sum(0)


def on_all_parts(count: int, work: Callable[[Part], object]) -> list:
    """What the work of each part gives, in the order of parts."""
    meeting = Meeting(count)

    def run(place: int):
        torch.set_num_threads(1)
        try:
            return work(Part(meeting, place))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
