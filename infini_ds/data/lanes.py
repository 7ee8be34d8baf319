"""Plans which segment of which document every lane reads at every step.

The planner works on integers only, without tokens or torch. The plan depends only on the seed, the
corpus and the position, and not on how the lanes are spread over processes.

Time runs in slots. Each lane reads one segment per slot, and a window is `window_segments` slots.
All lanes share one queue of documents. A lane whose document has ended takes the next document
from the queue at its next slot; lanes that become free in the same slot take theirs in index order.
Document d occupies its lane for `segments[d]` slots, so the lane that takes next is always the one
with the smallest (end slot, lane): a heap replays millions of documents without visiting segments.
With packing, a document's last segment may hold others behind it, its guests; see `packing`.
"""

from bisect import bisect_left
from collections.abc import Sequence
from heapq import heapreplace
from typing import Any, NamedTuple

import numpy as np

from infini_ds.data.document_queue import Queue
from infini_ds.data.mixed_queue import MixedQueue
from infini_ds.data.packing import PackedQueue, Units, open_queue
from infini_ds.errors import UserError

_REPLAYED = 4096
"""Documents that `seek` replays at once."""


class Guests(NamedTuple):
    """The documents that begin and end behind the first one of their segment. All are [guests].

    Those of one segment follow one another without a gap.
    """

    segments: np.ndarray
    """int64: lane x window_segments + index of the segment in the lane's window."""
    begins: np.ndarray
    """int64: position in the segment of the document's first input token."""
    documents: np.ndarray
    """int64: index of the document."""
    lengths: np.ndarray
    """int64: its inputs, all of them valid."""


class Plan(NamedTuple):
    """The segments that each lane reads in one step. All arrays are [batch, window_segments].

    They tell about the first document of each segment, the only one that may continue.
    """

    documents: np.ndarray
    """int64: index of the document."""
    offsets: np.ndarray
    """int64: position in the document of the segment's first input token."""
    lengths: np.ndarray
    """int32: valid inputs, 1 to segment_length; 0 once a lane of a finite pass has run out."""
    starts: np.ndarray
    """bool: whether the document starts with this segment."""
    guests: Guests | None = None
    """Other documents of the segments; None if segments are not packed."""

    @property
    def num_tokens(self) -> int:
        """Number of valid (input, label) pairs over all lanes."""
        own = int(self.lengths.sum(dtype=np.int64))
        return own if self.guests is None else own + int(self.guests.lengths.sum())


class Lanes:
    """Endless readers of documents, one for each row of the global batch.

    Attributes:
        packing: whether segments are packed. A state from before there was packing turns it off.
        step: number of steps planned so far.

    Args:
        lengths: [documents] stored tokens of each document, including BOS and EOS.
        segment_length: tokens per segment.
        window_segments: segments each lane reads in a step.
        batch_size: number of lanes.
        seed: seed for the order of documents, which changes every epoch.
        shares: number of documents and weight of each corpus of a mixture, in the order of
            `lengths`; lanes take tokens from the corpora in proportion to the weights. If empty,
            all documents belong to one corpus.
        packing: whether to fill the free ends of segments with whole documents.

    Raises:
        UserError: the corpus has too few segments for one step.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        segment_length: int,
        window_segments: int,
        batch_size: int,
        seed: int,
        shares: Sequence[tuple[int, float]] = (),
        packing: bool = False,
    ):
        self.segment_length = segment_length
        self.window_segments = window_segments
        self.batch_size = batch_size
        self.seed = seed
        self.packing = packing
        self._shares = shares
        self.positions = np.asarray(lengths, dtype=np.int64) - 1  # a token's label is its successor
        self.segments = -(-self.positions // segment_length)
        self.total_segments = int(self.segments.sum())
        self._total_tokens = int(self.positions.sum())
        self._check_size()
        self._rewind()

    def _check_size(self) -> None:
        batch, window, n = self.batch_size, self.window_segments, self.segment_length
        # Packing leaves at least as many segments as the tokens fill.
        available = -(-self._total_tokens // n) if self.packing else self.total_segments
        if batch * window <= available:
            return
        packed, remedy = "", "prepare more documents"
        if batch * window <= self.total_segments:
            packed, remedy = " if they are packed", f"set data.packing to false, or {remedy}"
        raise UserError(
            f"train.window_segments ({window}) x train.batch_size ({batch}) = {batch * window} "
            f"segments a step, but data.store has only {available} segments of "
            f"model.segment_length {n} to train on{packed}; lower one of the three or {remedy}"
        )

    def _rewind(self) -> None:
        self.step = 0
        self._slot = 0
        self._tokens = 0  # planned so far; only counted with packing
        self._queue: Queue = open_queue(self.positions, self.seed, self._shares)
        if self.packing:
            self._queue = PackedQueue(self._queue, self.positions, self.segment_length)
        # For each lane: its document, the slot where that started and the first slot after its end.
        self._documents = np.full(self.batch_size, -1, dtype=np.int64)
        self._starts = np.zeros(self.batch_size, dtype=np.int64)
        self._ends = np.zeros(self.batch_size, dtype=np.int64)
        # For each lane: the documents that share its document's last segment.
        self._guests: list[list[int]] = [[] for _ in range(self.batch_size)]

    @property
    def corpus_epochs(self) -> list[float]:
        """Passes over each corpus of a mixture so far; empty if there is no mixture."""
        queue = self._queue
        return queue.epochs if isinstance(queue, MixedQueue | PackedQueue) else []

    @property
    def epoch(self) -> float:
        """Passes over the corpus so far, counted in segments, or in tokens if they are packed.

        It is exact because no lane is ever idle.
        """
        if self.packing:
            return self._tokens / self._total_tokens
        return self._slot * self.batch_size / self.total_segments

    def next_plan(self) -> Plan:
        """Plans one step and advances all lanes by one window."""
        shape = (self.batch_size, self.window_segments)
        documents = np.empty(shape, dtype=np.int64)
        indices = np.empty(shape, dtype=np.int64)  # index of each segment in its document
        guests: list[int] = []
        guests_segments: list[int] = []
        for column in range(self.window_segments):
            free = np.flatnonzero(self._ends == self._slot)
            if len(free):
                taken = self._take(free)
                self._documents[free] = taken
                self._starts[free] = self._slot
                self._ends[free] = self._slot + self.segments[taken]
            documents[:, column] = self._documents
            indices[:, column] = self._slot - self._starts
            self._slot += 1
            if self.packing:
                for lane in np.flatnonzero(self._ends == self._slot).tolist():
                    own = self._guests[lane]
                    guests += own
                    guests_segments += [lane * self.window_segments + column] * len(own)
        self.step += 1
        offsets = indices * self.segment_length
        lengths = np.minimum(self.positions[documents] - offsets, self.segment_length)
        plan = Plan(documents, offsets, lengths.astype(np.int32), indices == 0)
        if self.packing:
            plan = plan._replace(guests=self._place(guests, guests_segments, lengths))
            self._tokens += plan.num_tokens
        return plan

    def _take(self, lanes: np.ndarray) -> np.ndarray:
        """Takes a document for each of some lanes, and its guests."""
        queue = self._queue
        if not isinstance(queue, PackedQueue):
            return queue.take(len(lanes))
        taken: list[np.ndarray] = []
        left = lanes.tolist()
        while left:
            hosts = queue.rest()[: len(left)]
            for index, lane in enumerate(left[: len(hosts)]):
                self._guests[lane] = queue.units.guests_of(queue.taken + index)
            queue.advance(hosts)
            taken.append(hosts)
            left = left[len(hosts) :]
        return np.concatenate(taken)

    def _place(self, documents: list[int], segments: list[int], lengths: np.ndarray) -> Guests:
        """Places guests one behind another.

        Args:
            documents: the guests, those of a segment in a row.
            segments: the segment of each.
            lengths: [batch, window_segments] tokens of the first document of each segment.
        """
        where, guests = np.array(segments, dtype=np.int64), np.array(documents, dtype=np.int64)
        sizes = self.positions[guests]
        before = np.cumsum(sizes) - sizes
        first = np.diff(where, prepend=-1) != 0
        before -= np.maximum.accumulate(np.where(first, before, 0))
        return Guests(where, lengths.reshape(-1)[where] + before, guests, sizes)

    def seek(self, step: int) -> None:
        """Moves to the position that `step` calls of next_plan reach from the beginning."""
        self._rewind()
        self.step = step
        self._slot = step * self.window_segments
        batch = self.batch_size
        # One integer orders the lanes by (end slot, lane); adding segments x batch keeps the lane.
        heap = list(range(batch))
        limit = self._slot * batch
        # For each lane: the units of its document's block, and which of them is the lane's.
        units_of: dict[int, Units] = {}
        unit_of = np.empty(batch, dtype=np.int64)
        while heap[0] < limit:
            order = self._queue.rest()[:_REPLAYED]
            keys = _replay(heap, (self.segments[order] * batch).tolist(), limit)
            order = order[: len(keys)]
            slots, lanes = np.divmod(np.array(keys, dtype=np.int64), batch)
            self._documents[lanes] = order  # a lane may take several: the last one stays
            self._starts[lanes] = slots
            if isinstance(self._queue, PackedQueue):
                self._tokens += self._queue.tokens(len(order))
                units_of |= dict.fromkeys(lanes.tolist(), self._queue.units)
                unit_of[lanes] = self._queue.taken + np.arange(len(order))
            self._queue.advance(order)
        for key in heap:
            self._ends[key % batch] = key // batch
        for lane, units in units_of.items():
            self._guests[lane] = units.guests_of(int(unit_of[lane]))
        if self.packing:
            self._tokens -= self._tokens_left()

    def _tokens_left(self) -> int:
        """Tokens of the lanes' documents and their guests that are still to be planned."""
        busy = np.flatnonzero(self._ends > self._slot)
        read = (self._slot - self._starts[busy]) * self.segment_length
        guests = [guest for lane in busy.tolist() for guest in self._guests[lane]]
        own = self.positions[self._documents[busy]] - read
        return int(own.sum() + self.positions[np.array(guests, dtype=np.int64)].sum())

    def state(self) -> dict[str, Any]:
        """Returns the position of all lanes as JSON values; `load_state` continues from there."""
        state = {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "segment_length": self.segment_length,
            "num_documents": len(self.segments),
            "num_tokens": self._total_tokens,
            "step": self.step,
            "slot": self._slot,
            "queue": self._queue.state(),
            "documents": self._documents.tolist(),
            "segments": (self._slot - self._starts).tolist(),
        }
        if self.packing:
            # A copy, since next_plan puts new lists in the place of those of its lanes.
            state |= {"packing": True, "tokens": self._tokens, "guests": [*self._guests]}
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from where `state` was taken.

        A state that says nothing about packing, as those from before there was packing, is
        continued without it.

        Raises:
            UserError: the state belongs to another batch size, seed, segment length or corpus, or
                was taken with packing and these lanes are without.
        """
        if self.packing and "packing" not in state:
            self.packing = False
            self._rewind()
        check_same_run(self.state(), state)
        self.step = state["step"]
        self._slot = state["slot"]
        # States from before there were mixtures hold the queue's values among their own.
        self._queue.load_state(
            state["queue"] if "queue" in state else [state["epoch"], state["next"]]
        )
        self._documents = np.array(state["documents"], dtype=np.int64)
        self._starts = self._slot - np.array(state["segments"], dtype=np.int64)
        # Before the first step no lane has a document, and all of them are free at slot 0.
        self._ends = self._starts + np.where(self._documents < 0, 0, self.segments[self._documents])
        if self.packing:
            self._tokens = state["tokens"]
            self._guests = [*state["guests"]]


def _replay(heap: list[int], durations: list[int], limit: int) -> list[int]:
    """Lets the lanes in a heap take documents as long as one of them is free before `limit`.

    Returns:
        The key at which each document is taken; there are fewer than documents if not all are.
    """
    before = heap.copy()
    keys = [heapreplace(heap, heap[0] + duration) for duration in durations]
    if keys[-1] >= limit:  # keys grow, so the first ones stay
        del keys[bisect_left(keys, limit) :]
        heap[:] = before
        for duration in durations[: len(keys)]:
            heapreplace(heap, heap[0] + duration)
    return keys


_ABSENT = {"packing": False}
"""What it means that a state lacks an entry, where that is not None."""


def check_same_run(mine: dict[str, Any], saved: dict[str, Any]) -> None:
    """Compares what two states of lanes tell about their runs.

    Raises:
        UserError: the saved state belongs to another batch size, seed, segment length, corpus or
            curriculum, or only one of the two is packed.
    """
    for name, setting in (
        ("curriculum", "train.curriculum.segments"),
        ("curriculum_keys", "train.curriculum.keys"),
        ("packing", "data.packing"),
        ("batch_size", "train.batch_size"),
        ("seed", "seed"),
        ("segment_length", "model.segment_length"),
        ("num_documents", "data.store: documents"),
        ("num_tokens", "data.store: tokens"),
    ):
        have, had = (state.get(name, _ABSENT.get(name)) for state in (mine, saved))
        if have != had:
            raise UserError(
                f"{setting} ({have}) must be {had}, as when the run was saved; change it back, or "
                "start a new run with another output_dir"
            )


def held_out_plans(
    lengths: np.ndarray,
    segment_length: int,
    window_segments: int,
    batch_size: int,
    max_segments: int,
) -> list[Plan]:
    """Plans a finite pass over the first documents, each read once, whole and from its start.

    Args:
        lengths: [documents] stored tokens of each document, including BOS and EOS.
        max_segments: limit on the segments of all documents together. Documents are taken in order
            up to it, but at least one is; 0 takes all.

    Returns:
        Plans until the last token is read. Lanes that run out earlier have segments of length 0
        (document 0, offset 0, starts True).

    Raises:
        UserError: there is no document.
    """
    positions = np.asarray(lengths, dtype=np.int64) - 1
    if not len(positions):
        raise UserError(
            "data.store: the held-out split is empty; raise data.held_out_fraction or prepare more "
            "documents"
        )
    segments = -(-positions // segment_length)
    count = len(segments)
    if max_segments:
        count = max(1, int(np.searchsorted(np.cumsum(segments), max_segments, side="right")))
    segments = segments[:count]

    heap = list(range(batch_size))  # as in Lanes.seek
    keys = []
    for duration in (segments * batch_size).tolist():
        keys.append(heap[0])
        heapreplace(heap, heap[0] + duration)
    slots = max(heap) // batch_size
    windows = -(-slots // window_segments)

    shape = (batch_size, windows * window_segments)
    documents = np.zeros(shape, dtype=np.int64)
    offsets = np.zeros(shape, dtype=np.int64)
    valid = np.zeros(shape, dtype=np.int32)
    starts = np.ones(shape, dtype=bool)
    first_slots, lanes = np.divmod(np.array(keys, dtype=np.int64), batch_size)
    document = np.repeat(np.arange(count), segments)
    # Index of each segment in its document: [total segments].
    index = np.arange(len(document)) - np.repeat(np.cumsum(segments) - segments, segments)
    where = (lanes[document], first_slots[document] + index)
    documents[where] = document
    offsets[where] = index * segment_length
    valid[where] = np.minimum(positions[document] - offsets[where], segment_length)
    starts[where] = index == 0
    cuts = [slice(i, i + window_segments) for i in range(0, shape[1], window_segments)]
    return [Plan(documents[:, cut], offsets[:, cut], valid[:, cut], starts[:, cut]) for cut in cuts]
