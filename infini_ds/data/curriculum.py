"""The planner of a curriculum: documents of growing lengths.

A level is a length in segments. The steps of a level read documents of its length, but a share of
them, spread evenly, reads the earlier lengths in turn. When the share of right answers, over the
latest steps at the level's own length, is high enough, the next level begins.

Every length divides the window, so a window is filled by whole documents: none goes on in the next
one. Which documents a step reads is a function of the seed, the corpus and the steps at which the
levels began.
"""

from math import floor
from typing import Any

import numpy as np

from infini_ds.config import CurriculumConfig
from infini_ds.data.document_queue import DocumentQueue
from infini_ds.data.lanes import Plan, check_same_run
from infini_ds.errors import UserError


class CurriculumLanes:
    """Endless readers of documents of one length at a time, one for each row of the global batch.

    Attributes:
        step: steps planned.
        level: index of the length in `config.segments`.

    Args:
        lengths: [documents] stored tokens of each document, BOS and EOS included.
        segment_length: tokens of a segment.
        window_segments: segments each lane reads in a step, a multiple of each of config.segments.
        batch_size: number of lanes.
        seed: seed of the order of documents, which is new in every epoch of a length.

    Raises:
        UserError: there is no document of one of the lengths.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        segment_length: int,
        window_segments: int,
        batch_size: int,
        seed: int,
        config: CurriculumConfig,
    ):
        self.segment_length = segment_length
        self.window_segments = window_segments
        self.batch_size = batch_size
        self.seed = seed
        self.step = 0
        self.level = 0
        self._config = config
        self._positions = np.asarray(lengths, dtype=np.int64) - 1
        segments = -(-self._positions // segment_length)
        # Per level: the documents of its length, and their order.
        self._documents = [np.flatnonzero(segments == length) for length in config.segments]
        for length, documents in zip(config.segments, self._documents, strict=True):
            if not len(documents):
                raise UserError(
                    f"train.curriculum.segments: data.store has no document of {length} segments "
                    f"of model.segment_length {segment_length} to train on; leave {length} out, or "
                    "prepare documents of that length"
                )
        self._queues = [
            DocumentQueue(len(documents), seed, length)
            for length, documents in zip(config.segments, self._documents, strict=True)
        ]
        self._total_segments = sum(
            length * len(documents)
            for length, documents in zip(config.segments, self._documents, strict=True)
        )
        self._level_step = 0  # steps planned since the level began
        self._answers: list[float] = []  # shares of right answers at the level's length

    @property
    def epoch(self) -> float:
        """Segments read so far, over those of all documents of the curriculum's lengths."""
        return self.step * self.batch_size * self.window_segments / self._total_segments

    @property
    def level_segments(self) -> int:
        """Length of the level's documents, in segments."""
        return self._config.segments[self.level]

    @property
    def right_answers(self) -> float:
        """Mean share of right answers over the latest steps at the level's length; 0 before any."""
        return sum(self._answers) / len(self._answers) if self._answers else 0.0

    def next_plan(self) -> Plan:
        """Plans one step and advances all lanes by one window."""
        level = self._level_of(self._level_step)
        length = self._config.segments[level]
        shape = (self.batch_size, self.window_segments)
        taken = self._queues[level].take(self.batch_size * self.window_segments // length)
        documents = np.repeat(self._documents[level][taken], length).reshape(shape)
        indices = np.broadcast_to(np.arange(self.window_segments) % length, shape)
        offsets = indices * self.segment_length
        lengths = np.minimum(self._positions[documents] - offsets, self.segment_length)
        self.step += 1
        self._level_step += 1
        return Plan(documents, offsets, lengths.astype(np.int32), indices == 0)

    def observe(self, exact_match: float) -> None:
        """Takes in how the step planned last went; to be called once after each step with answers.

        The level, and so the next plan, may change: all ranks must see the same number.

        Args:
            exact_match: share of the documents read whose answer was right, in [0, 1].
        """
        if self._level_of(self._level_step - 1) != self.level:
            return  # a review says nothing of the level's own length
        window = self._config.window
        self._answers = [*self._answers, exact_match][-window:]
        enough = len(self._answers) == window and self.right_answers >= self._config.advance_at
        if enough and self.level + 1 < len(self._config.segments):
            self.level += 1
            self._level_step = 0
            self._answers = []

    def _level_of(self, level_step: int) -> int:
        """The level whose documents a step reads, given the steps before it at the present one."""
        reviews = floor(level_step * self._config.review)
        is_review = floor((level_step + 1) * self._config.review) > reviews
        return reviews % self.level if self.level and is_review else self.level

    def state(self) -> dict[str, Any]:
        """Where the lanes stand, as JSON values; `load_state` of an equal one goes on there."""
        return {
            "curriculum": self._config.segments,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "segment_length": self.segment_length,
            "num_documents": len(self._positions),
            "num_tokens": int(self._positions.sum()),
            "step": self.step,
            "level": self.level,
            "level_step": self._level_step,
            "answers": self._answers,
            "queues": [queue.state() for queue in self._queues],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            UserError: the state is of another curriculum, batch size, seed, segment length or
                corpus.
        """
        check_same_run(self.state(), state)
        self.step = state["step"]
        self.level = state["level"]
        self._level_step = state["level_step"]
        self._answers = state["answers"]
        for queue, place in zip(self._queues, state["queues"], strict=True):
            queue.load_state(place)
