"""Packs short documents into the free ends of segments, which would otherwise be padding.

A document of p tokens to train on takes ceil(p / n) segments of n tokens. A unit is a document of
any length, the host, and whole documents that share the host's last segment with it, the guests.

Units are formed within blocks of the order of documents, so no document moves further than a block
is long. Documents of at most a segment are placed, the longest first, where they leave the least
room; one that fits nowhere becomes a host. Hosts keep the order that they had.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import Any, NamedTuple

import numpy as np

from infini_ds.data.document_queue import DocumentQueue, Queue
from infini_ds.data.mixed_queue import MixedQueue

BLOCK = 2048
"""Documents of a block. Saved runs rely on it, so it must never change."""
_MEASURED = 2**18
"""Documents after which the share of useful tokens is known well enough."""


class Units(NamedTuple):
    """The units of a block."""

    hosts: np.ndarray
    """int64 [units], in their order in the block."""
    ends: np.ndarray
    """int64 [units + 1]: unit u has the guests from ends[u] to ends[u + 1]."""
    guests: np.ndarray
    """int64 [guests]: the guests of all units, the longest of each unit first."""

    def guests_of(self, unit: int) -> list[int]:
        """Returns the guests of one unit."""
        return self.guests[self.ends[unit] : self.ends[unit + 1]].tolist()


def pack(sizes: np.ndarray, segment_length: int) -> Units:
    """Forms the units of a block, whose documents are numbered by their order in it.

    Args:
        sizes: int64 [documents], tokens to train on in each document, at least 1.
    """
    # A host and its free room are one integer, room x count + host.
    count = len(sizes)
    long = np.flatnonzero(sizes > segment_length)
    short = np.flatnonzero(sizes <= segment_length)
    short = short[_order(segment_length - sizes[short], segment_length)]
    # A heap of the hosts with too little room for the present size, negative so that the one with
    # the most room comes first. As sizes fall, it hands them over to a stack of those with enough
    # room, so that the best one is always on top of it.
    waiting = (-((-sizes[long] % segment_length) * count + long)).tolist()
    heapify(waiting)
    fitting: list[int] = []
    host_of = []
    needs = (sizes[short] * count).tolist()
    for document, needed in zip(short.tolist(), needs, strict=True):
        while waiting and -waiting[0] >= needed:
            fitting.append(-heappop(waiting))
        host = fitting.pop() if fitting else segment_length * count + document
        host_of.append(host)
        host -= needed
        if host >= needed:
            fitting.append(host)
        elif host >= count:  # there is room at all
            heappush(waiting, -host)
    return _units(count, short, np.array(host_of, dtype=np.int64) % count)


def _order(keys: np.ndarray, most: int) -> np.ndarray:
    """Returns the order of whole numbers up to `most`; fast, as it sorts the smallest type."""
    return np.argsort(keys.astype(np.min_scalar_type(most)), kind="stable")


def _units(documents: int, short: np.ndarray, host_of: np.ndarray) -> Units:
    """Groups documents by their hosts; `host_of` names those of `short`, some of them their own."""
    is_guest = host_of != short
    guests, host_of = short[is_guest], host_of[is_guest]
    is_host = np.ones(documents, dtype=bool)
    is_host[guests] = False
    hosts = np.flatnonzero(is_host)
    counts = np.bincount(host_of, minlength=documents)[hosts]
    ends = np.concatenate(([0], np.cumsum(counts)))
    return Units(hosts, ends, guests[_order(host_of, documents)])


class PackedQueue(Queue):
    """Forms units from the documents of another queue, and yields their hosts.

    Its state is the other queue's at the beginning of the current block, and how many of the
    block's units were taken.

    Attributes:
        units: the units of the current block.
        taken: how many of them were taken.

    Args:
        documents: the other queue.
        sizes: int64 [documents], tokens to train on in each document.
    """

    def __init__(self, documents: Queue, sizes: np.ndarray, segment_length: int):
        self._documents = documents
        self._sizes = sizes
        self._segment_length = segment_length
        nothing = np.empty(0, dtype=np.int64)
        self.units = Units(nothing, np.zeros(1, dtype=np.int64), nothing)
        self._block = documents.state()
        self.taken = 0

    @property
    def epochs(self) -> list[float]:
        """Passes over each corpus of a mixture so far, as in `MixedQueue`; else empty."""
        if not isinstance(self._documents, MixedQueue):
            return []
        hosts, ends, guests = self.units
        left = np.concatenate((hosts[self.taken :], guests[ends[self.taken] :]))
        return self._documents.epochs_without(left)

    def rest(self) -> np.ndarray:
        """Returns the hosts left in this block, or those of the next one if none is left."""
        if self.taken == len(self.units.hosts):
            self._form(self._documents)
        return self.units.hosts[self.taken :]

    def tokens(self, count: int) -> int:
        """Returns the tokens to train on in the next `count` units of the block."""
        first, last = self.taken, self.taken + count
        hosts, ends, guests = self.units
        own = self._sizes[hosts[first:last]].sum()
        return int(own + self._sizes[guests[ends[first] : ends[last]]].sum())

    def _form(self, documents: Queue) -> None:
        self._block = documents.state()
        block = documents.take_block(BLOCK)
        hosts, ends, guests = pack(self._sizes[block], self._segment_length)
        self.units = Units(block[hosts], ends, block[guests])
        self.taken = 0

    def advance(self, indices: np.ndarray) -> None:
        self.taken += len(indices)

    def state(self) -> dict[str, Any]:
        return {"block": self._block, "units": self.taken}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from where `state` was taken.

        A block that was begun is read as it was formed; new weights of a mixture apply after it.
        """
        former = self._documents.as_saved(state["block"])
        self._form(former)
        self.taken = state["units"]
        if former is not self._documents:
            self._documents.load_state(former.state())


def open_queue(sizes: np.ndarray, seed: int, shares: Sequence[tuple[int, float]]) -> Queue:
    """Returns the order of a run's documents, without packing.

    Args:
        sizes: int64 [documents], tokens to train on in each document.
        shares: number of documents and weight of each corpus of a mixture; else empty.
    """
    if not shares:
        return DocumentQueue(len(sizes), seed)
    counts, weights = zip(*shares, strict=True)
    return MixedQueue(np.split(sizes, np.cumsum(counts[:-1])), weights, seed)


def useful_share(
    lengths: np.ndarray,
    segment_length: int,
    packing: bool,
    shares: Sequence[tuple[int, float]] = (),
    seed: int = 0,
) -> float:
    """Returns which share of the positions of all segments holds a token to train on.

    One epoch of a single corpus is measured, or its first few hundred thousand documents; of a
    mixture, as many as it has documents.

    Args:
        lengths: [documents] stored tokens of each document, including BOS and EOS.
        packing: whether segments are packed.
        shares: number of documents and weight of each corpus of a mixture; else empty.
        seed: seed for the order of documents.
    """
    sizes = np.asarray(lengths, dtype=np.int64) - 1
    queue = open_queue(sizes, seed, shares)
    left = min(len(sizes), _MEASURED)
    tokens = segments = 0
    while left:
        block = sizes[queue.take_block(min(left, BLOCK))]
        hosts = block[pack(block, segment_length).hosts] if packing else block
        tokens += int(block.sum())
        segments += int((-(-hosts // segment_length)).sum())
        left -= len(block)
    return tokens / (segments * segment_length)
