"""Plans a curriculum, in which documents grow longer, or hold more keys, as the model learns.

A level is a document length in segments. The steps of a level read documents of that length, except
for a fixed share, spread evenly, that reviews the earlier levels in turn. The next level begins
once the share of right answers over the latest steps of the level's own documents is high enough.

With several numbers of pass keys, each of them is a level of its own at the first length, from the
smallest to the largest; at a longer length, the steps of the level read all of them in turn.

Every length divides the window, so whole documents fill a window and none continues in the next
one. Which documents a step reads depends only on the seed, the corpus and the steps at which the
levels began.
"""

from collections.abc import Sequence
from math import floor
from typing import Any, NamedTuple

import numpy as np

from infini_ds.config import CurriculumConfig
from infini_ds.data.document_queue import DocumentQueue
from infini_ds.data.lanes import Plan, check_same_run
from infini_ds.errors import UserError


class Group(NamedTuple):
    """The documents that one step may read."""

    segments: int
    """Their length."""
    keys: int | None
    """Their number of pass keys; None stands for any."""


def levels_of(config: CurriculumConfig) -> list[list[Group]]:
    """Returns the groups of each level, which the level's steps read in turn."""
    keys: Sequence[int | None] = config.keys or [None]
    first, *longer = config.segments
    return [
        *([Group(first, number)] for number in keys),
        *([Group(length, number) for number in keys] for length in longer),
    ]


class CurriculumLanes:
    """Endless readers, one per row of the global batch, that share one document length at a time.

    Attributes:
        step: number of steps planned so far.
        level: index of the current level in `levels_of(config)`.
        packing: False, as documents fill windows as they are.

    Args:
        lengths: [documents] stored tokens of each document, including BOS and EOS.
        segment_length: tokens per segment.
        window_segments: segments each lane reads in a step, a multiple of each of config.segments.
        batch_size: number of lanes.
        seed: seed for the order of documents, which changes with every epoch of a group.
        groups: [documents] number of pass keys in each document, which config.keys needs.

    Raises:
        UserError: the corpus has no document of one of the lengths, or of one of the numbers of
            keys in that length.
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
        groups: np.ndarray | None = None,
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
        self._levels = levels_of(config)
        # For each group: its documents, and the order in which they are read.
        self._documents: dict[Group, np.ndarray] = {}
        self._queues: dict[Group, DocumentQueue] = {}
        for group in dict.fromkeys(group for level in self._levels for group in level):
            chosen = segments == group.segments
            if group.keys is not None:
                chosen &= groups == group.keys  # all False if no groups are given
            documents = np.flatnonzero(chosen)
            if not len(documents):
                raise _without_documents(group, segment_length)
            key = [group.segments] if group.keys is None else [group.segments, group.keys]
            self._documents[group] = documents
            self._queues[group] = DocumentQueue(len(documents), seed, *key)
        self._total_segments = sum(
            group.segments * len(documents) for group, documents in self._documents.items()
        )
        self._level_step = 0  # steps planned since this level began
        self._answers: list[float] = []  # shares of right answers of this level

    @property
    def epoch(self) -> float:
        """Passes so far over all documents of the curriculum, counted in segments."""
        return self.step * self.batch_size * self.window_segments / self._total_segments

    @property
    def level_segments(self) -> int:
        """Length in segments of the documents at the current level."""
        return self._levels[self.level][0].segments

    @property
    def level_keys(self) -> int | None:
        """Largest number of pass keys in the current level's documents; None stands for any."""
        return self._levels[self.level][-1].keys

    @property
    def right_answers(self) -> float:
        """Mean share of right answers over the latest steps of this level; 0 at first."""
        return sum(self._answers) / len(self._answers) if self._answers else 0.0

    def next_plan(self) -> Plan:
        """Plans one step and advances all lanes by one window."""
        group = self._group_of(self._level_step)
        length = group.segments
        shape = (self.batch_size, self.window_segments)
        taken = self._queues[group].take(self.batch_size * self.window_segments // length)
        documents = np.repeat(self._documents[group][taken], length).reshape(shape)
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
            exact_match: share of all answers asked for that were right, in [0, 1].
        """
        if self._level_of(self._level_step - 1) != self.level:
            return  # a review tells nothing about the level's own documents
        window = self._config.window
        self._answers = [*self._answers, exact_match][-window:]
        enough = len(self._answers) == window and self.right_answers >= self._config.advance_at
        if enough and self.level + 1 < len(self._levels):
            self.level += 1
            self._level_step = 0
            self._answers = []

    def _level_of(self, level_step: int) -> int:
        """Returns the level whose documents a step reads, given the steps this level has had."""
        reviews = floor(level_step * self._config.review)
        is_review = floor((level_step + 1) * self._config.review) > reviews
        return reviews % self.level if self.level and is_review else self.level

    def _group_of(self, level_step: int) -> Group:
        """Returns the group whose documents a step reads, given the steps this level has had."""
        level = self._level_of(level_step)
        reviews = floor(level_step * self._config.review) if self.level else 0
        # How often the chosen level has been read, or all earlier ones reviewed, since this began.
        turn = level_step - reviews if level == self.level else reviews // self.level
        groups = self._levels[level]
        return groups[turn % len(groups)]

    def state(self) -> dict[str, Any]:
        """Returns the position of the lanes as JSON values; `load_state` continues from there."""
        keys = {"curriculum_keys": self._config.keys} if self._config.keys else {}
        return {
            "curriculum": self._config.segments,
            **keys,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "segment_length": self.segment_length,
            "num_documents": len(self._positions),
            "num_tokens": int(self._positions.sum()),
            "step": self.step,
            "level": self.level,
            "level_step": self._level_step,
            "answers": self._answers,
            "queues": [queue.state() for queue in self._queues.values()],
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
        for queue, place in zip(self._queues.values(), state["queues"], strict=True):
            queue.load_state(place)


def _without_documents(group: Group, segment_length: int) -> UserError:
    setting, which, what = "segments", group.segments, ""
    if group.keys is not None:
        setting, which, what = "keys", group.keys, f" with {group.keys} pass keys"
    return UserError(
        f"train.curriculum.{setting}: data.store has no document of {group.segments} segments of "
        f"model.segment_length {segment_length}{what} to train on; leave {which} out, or prepare "
        f"documents of that {'number' if what else 'length'}"
    )
