"""Plans which segment of which document every lane reads at every step.

The planner works on integers only, without tokens or torch. The plan depends only on the seed, the
corpus and the position, and not on how the lanes are spread over processes.

Time runs in slots. Each lane reads one segment per slot, and a window is `window_segments` slots.
All lanes share one queue of documents. A lane whose document has ended takes the next document
from the queue at its next slot; lanes that become free in the same slot take theirs in index order.
Document d occupies its lane for `segments[d]` slots, so the lane that takes next is always the one
with the smallest (end slot, lane): a heap replays millions of documents without visiting segments.
"""

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from infini_ds.data.document_queue import DocumentQueue, Queue
from infini_ds.data.mixed_queue import MixedQueue
from infini_ds.errors import UserError


class Plan(NamedTuple):
    """The segments that each lane reads in one step. All arrays are [batch, window_segments]."""

    documents: np.ndarray
    """int64: index of the document."""
    offsets: np.ndarray
    """int64: position in the document of the segment's first input token."""
    lengths: np.ndarray
    """int32: valid inputs, 1 to segment_length; 0 once a lane of a finite pass has run out."""
    starts: np.ndarray
    """bool: whether the document starts with this segment."""

    @property
    def num_tokens(self) -> int:
        """Number of valid (input, label) pairs over all lanes."""
        return int(self.lengths.sum(dtype=np.int64))


class Lanes:
    """Endless readers of documents, one for each row of the global batch.

    Args:
        lengths: [documents] stored tokens of each document, including BOS and EOS.
        segment_length: tokens per segment.
        window_segments: segments each lane reads in a step.
        batch_size: number of lanes.
        seed: seed for the order of documents, which changes every epoch.
        shares: number of documents and weight of each corpus of a mixture, in the order of
            `lengths`; lanes take tokens from the corpora in proportion to the weights. If empty,
            all documents belong to one corpus.

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
    ):
        self.segment_length = segment_length
        self.window_segments = window_segments
        self.batch_size = batch_size
        self.seed = seed
        self._shares = shares
        self.positions = np.asarray(lengths, dtype=np.int64) - 1  # a token's label is its successor
        self.segments = -(-self.positions // segment_length)
        self.total_segments = int(self.segments.sum())
        if batch_size * window_segments > self.total_segments:
            raise UserError(
                f"train.window_segments ({window_segments}) x train.batch_size ({batch_size}) = "
                f"{batch_size * window_segments} segments a step, but data.store has only "
                f"{self.total_segments} segments of model.segment_length {segment_length} to train "
                "on; lower one of the three or prepare more documents"
            )
        self._rewind()

    def _rewind(self) -> None:
        self.step = 0
        self._slot = 0
        self._queue = self._new_queue()
        # For each lane: its document, the slot where that started and the first slot after its end.
        self._documents = np.full(self.batch_size, -1, dtype=np.int64)
        self._starts = np.zeros(self.batch_size, dtype=np.int64)
        self._ends = np.zeros(self.batch_size, dtype=np.int64)

    def _new_queue(self) -> Queue:
        if not self._shares:
            return DocumentQueue(len(self.segments), self.seed)
        counts, weights = zip(*self._shares, strict=True)
        sizes = np.split(self.positions, np.cumsum(counts[:-1]))
        return MixedQueue(sizes, weights, self.seed)

    @property
    def corpus_epochs(self) -> list[float]:
        """Passes over each corpus of a mixture so far; empty if there is no mixture."""
        return self._queue.epochs if isinstance(self._queue, MixedQueue) else []

    @property
    def epoch(self) -> float:
        """Passes over the corpus so far. It is exact because no lane is ever idle."""
        return self._slot * self.batch_size / self.total_segments

    def next_plan(self) -> Plan:
        """Plans one step and advances all lanes by one window."""
        shape = (self.batch_size, self.window_segments)
        documents = np.empty(shape, dtype=np.int64)
        indices = np.empty(shape, dtype=np.int64)  # index of each segment in its document
        for column in range(self.window_segments):
            free = np.flatnonzero(self._ends == self._slot)
            if len(free):
                taken = self._queue.take(len(free))
                self._documents[free] = taken
                self._starts[free] = self._slot
                self._ends[free] = self._slot + self.segments[taken]
            documents[:, column] = self._documents
            indices[:, column] = self._slot - self._starts
            self._slot += 1
        self.step += 1
        offsets = indices * self.segment_length
        lengths = np.minimum(self.positions[documents] - offsets, self.segment_length)
        return Plan(documents, offsets, lengths.astype(np.int32), indices == 0)

    def seek(self, step: int) -> None:
        """Moves to the position that `step` calls of next_plan reach from the beginning."""
        self._rewind()
        self.step = step
        self._slot = step * self.window_segments
        batch = self.batch_size
        # One integer orders the lanes by (end slot, lane); adding segments x batch keeps the lane.
        heap = list(range(batch))
        limit = self._slot * batch
        documents = [-1] * batch
        starts = [0] * batch
        while heap[0] < limit:
            order = self._queue.rest()
            durations = (self.segments[order] * batch).tolist()
            taken = 0
            for document, duration in zip(order.tolist(), durations, strict=True):
                first = heap[0]
                if first >= limit:
                    break
                heapq.heapreplace(heap, first + duration)
                lane = first % batch
                documents[lane] = document
                starts[lane] = first // batch
                taken += 1
            self._queue.advance(order[:taken])
        self._documents = np.array(documents, dtype=np.int64)
        self._starts = np.array(starts, dtype=np.int64)
        self._ends = np.empty(batch, dtype=np.int64)
        for key in heap:
            self._ends[key % batch] = key // batch

    def state(self) -> dict[str, Any]:
        """Returns the position of all lanes as JSON values; `load_state` continues from there."""
        return {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "segment_length": self.segment_length,
            "num_documents": len(self.segments),
            "num_tokens": int(self.positions.sum()),
            "step": self.step,
            "slot": self._slot,
            "queue": self._queue.state(),
            "documents": self._documents.tolist(),
            "segments": (self._slot - self._starts).tolist(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from where `state` was taken.

        Raises:
            UserError: the state belongs to another batch size, seed, segment length or corpus.
        """
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


def check_same_run(mine: dict[str, Any], saved: dict[str, Any]) -> None:
    """Compares what two states of lanes tell about their runs.

    Raises:
        UserError: the saved state belongs to another batch size, seed, segment length, corpus or
            curriculum.
    """
    for name, setting in (
        ("curriculum", "train.curriculum.segments"),
        ("batch_size", "train.batch_size"),
        ("seed", "seed"),
        ("segment_length", "model.segment_length"),
        ("num_documents", "data.store: documents"),
        ("num_tokens", "data.store: tokens"),
    ):
        have, had = mine.get(name), saved.get(name)  # states without a curriculum lack its entry
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
        heapq.heapreplace(heap, heap[0] + duration)
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
    return [
        Plan(*(array[:, i : i + window_segments] for array in (documents, offsets, valid, starts)))
        for i in range(0, shape[1], window_segments)
    ]
