"""Plans a curriculum, in which documents grow longer as the model learns.

A level is a document length in segments. The steps of a level read documents of that length, except
for a fixed share, spread evenly, that reviews the earlier lengths in turn. The next level begins
once the share of right answers over the latest steps at the level's own length is high enough.

Every length divides the window, so whole documents fill a window and none continues in the next
one. Which documents a step reads depends only on the seed, the corpus and the steps at which the
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
    """Endless readers, one per row of the global batch, that share one document length at a time.

    Attributes:
        step: number of steps planned so far.
        level: index of the current length in `config.segments`.
        packing: False, as documents fill windows as they are.

    Args:
        lengths: [documents] stored tokens of each document, including BOS and EOS.
        segment_length: tokens per segment.
        window_segments: segments each lane reads in a step, a multiple of each of config.segments.
        batch_size: number of lanes.
        seed: seed for the order of documents, which changes with every epoch of a length.

    Raises:
        UserError: the corpus has no document of one of the lengths.
    """

    packing = False

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
        # For each level: the documents of its length, and the order in which they are read.
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
        self._level_step = 0  # steps planned since this level began
        self._answers: list[float] = []  # shares of right answers at the level's length

    @property
    def epoch(self) -> float:
        """Passes so far over all documents of the curriculum's lengths, counted in segments."""
        return self.step * self.batch_size * self.window_segments / self._total_segments

    @property
    def level_segments(self) -> int:
        """Length in segments of the documents at the current level."""
        return self._config.segments[self.level]

    @property
    def right_answers(self) -> float:
        """Mean share of right answers over the latest steps at this level's length; 0 at first."""
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
        """Records how well the last planned step was answered; call it once after each such step.

        The level may change, and with it the next plan, so all ranks must pass the same number.

        Args:
            exact_match: share of the documents read whose answer was right, in [0, 1].
        """
        if self._level_of(self._level_step - 1) != self.level:
            return  # a review tells nothing about the level's own length
        window = self._config.window
        self._answers = [*self._answers, exact_match][-window:]
        enough = len(self._answers) == window and self.right_answers >= self._config.advance_at
        if enough and self.level + 1 < len(self._config.segments):
            self.level += 1
            self._level_step = 0
            self._answers = []

    def _level_of(self, level_step: int) -> int:
        """Returns the level whose documents a step reads, given the steps this level has had."""
        reviews = floor(level_step * self._config.review)
        is_review = floor((level_step + 1) * self._config.review) > reviews
        return reviews % self.level if self.level and is_review else self.level

    def state(self) -> dict[str, Any]:
        """Returns the position of the lanes as JSON values; `load_state` continues from there."""
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
        """Continues from where `state` was taken.

        Raises:
            UserError: the state belongs to another curriculum, batch size, seed, segment length or
                corpus.
        """
        check_same_run(self.state(), state)
        self.step = state["step"]
        self.level = state["level"]
        self._level_step = state["level_step"]
        self._answers = state["answers"]
        for queue, place in zip(self._queues, state["queues"], strict=True):
            queue.load_state(place)
