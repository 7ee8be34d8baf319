"""Makes documents of multi-query associative recall (Zoology, arXiv 2312.04927) across segments.

    | . k3 v3 . k1 v1 | . . k2 v2 . . | . . . . . . . | k1 v1 . k3 v3 k2 v2 |
      first segments: pairs stated      the distance    last segments: every key asked

A pair is a key and, directly after it, its value, at a random place among filler; no pair is cut by
the end of a segment. The first segments state all pairs, then come segments of filler alone, and
the last segments ask for all keys in another random order: the label of a key is its value, which
also follows it in the document. All other positions have no label.

Tokens are numbers that stand for nothing: first the filler, then the keys, then the values.
Everything is a function of the random stream alone.

This module does not import torch until documents are drawn, so that mistakes are reported at once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FILLER = 64
"""Number of different tokens of filler."""
TRAINING, EVALUATION = 0, 1
"""First numbers of the keys of `recall_random`."""
_LEAST_SEGMENTS = 3
_ADVANCE_AT, _LAST_STEPS, _REVIEW_EVERY = 0.9, 20, 5


class Size(NamedTuple):
    """The size of a document."""

    pairs: int
    """Number of pairs, at most `keys`."""
    segment_length: int
    """Tokens of a segment, at least 2."""
    keys: int
    """Number of different keys, of which a document uses each at most once, and of values."""

    @property
    def stating_segments(self) -> int:
        """Segments that state the pairs: at least 3, of which pairs fill at most a third."""
        return max(_LEAST_SEGMENTS, -(-3 * self.pairs // (self.segment_length // 2)))

    @property
    def asking_segments(self) -> int:
        """Segments that ask for the keys, as few as can hold them."""
        return -(-self.pairs // (self.segment_length // 2))

    def tokens(self, distance: int) -> int:
        """Returns the length of a document with so many segments between pairs and questions."""
        segments = self.stating_segments + distance + self.asking_segments
        return segments * self.segment_length


def vocabulary(keys: int) -> int:
    """Returns how many token ids the documents use; with 96 keys they are bytes."""
    return FILLER + 2 * keys


class Documents(NamedTuple):
    """Several documents of one size, without the filler between pairs and questions; int64."""

    stated: np.ndarray
    """[documents, stating_segments x n]: pairs among filler."""
    asked: np.ndarray
    """[documents, asking_segments x n]: all keys and their values in another order."""
    labels: np.ndarray
    """Like `asked`: the value where a key is asked, and IGNORE_INDEX elsewhere."""


def recall_random(*key: int) -> np.random.Generator:
    """Returns a random stream that integers of at least 0 identify."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def draw_documents(random: np.random.Generator, size: Size, count: int) -> Documents:
    """Draws documents; keys of a document differ, values are drawn with replacement.

    Raises:
        ValueError: there are more pairs than keys, or the segments have no room for a pair.
    """
    if not 1 <= size.pairs <= size.keys or size.segment_length < 2:
        raise ValueError(f"{size}: takes 1 to {size.keys} pairs, and 2 tokens in a segment")
    from infini_ds.layout import IGNORE_INDEX

    keys = FILLER + _some_of(random, count, size.keys, size.pairs)
    values = FILLER + size.keys + random.integers(0, size.keys, keys.shape)
    stated, _ = _scattered(random, keys, values, size.stating_segments, size.segment_length)
    order = _some_of(random, count, size.pairs, size.pairs)
    keys, values = (np.take_along_axis(part, order, axis=1) for part in (keys, values))
    asked, places = _scattered(random, keys, values, size.asking_segments, size.segment_length)
    labels = np.full_like(asked, IGNORE_INDEX)
    np.put_along_axis(labels, places, values, axis=1)
    return Documents(stated, asked, labels)


def draw_filler(random: np.random.Generator, count: int, tokens: int) -> np.ndarray:
    """Draws filler, int64 [count, tokens]."""
    return random.integers(0, FILLER, (count, tokens))


def _some_of(random: np.random.Generator, count: int, everything: int, some: int) -> np.ndarray:
    """Draws different numbers below `everything` in random order, [count, some]."""
    return random.random((count, everything)).argsort(axis=1)[:, :some]


def _scattered(
    random: np.random.Generator, keys: np.ndarray, values: np.ndarray, segments: int, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Puts pairs at random places among filler, in their order.

    Returns:
        The tokens, [documents, segments x n], and the place of each key, [documents, pairs].
    """
    count, pairs = keys.shape
    slots = _some_of(random, count, segments * (n // 2), pairs) // (n // 2)
    held = (slots[..., None] == np.arange(segments)).sum(axis=1)[..., None]
    # A segment is a row of n - held units, of which `held` are pairs and the rest single tokens.
    unit = np.arange(n)
    drawn = np.where(unit < n - held, random.random((count, segments, n)), 2.0)
    is_pair = drawn.argsort(axis=-1).argsort(axis=-1) < held
    begins = unit + is_pair.cumsum(axis=-1) - is_pair + n * np.arange(segments)[:, None]
    places = begins[is_pair].reshape(count, pairs)
    tokens = draw_filler(random, count, segments * n)
    np.put_along_axis(tokens, places, keys, axis=1)
    np.put_along_axis(tokens, places + 1, values, axis=1)
    return tokens, places


class Levels:
    """Decides on how many pairs each training step trains: few first, then more.

    The next number begins once more than 0.9 of the answers over the last 20 steps with the present
    one were right, or once its share of all steps is used up. Every fifth step reviews the earlier
    numbers, in turn.

    Args:
        pairs: the numbers of pairs, one after another.
        steps: number of steps of the whole training.
    """

    def __init__(self, pairs: Sequence[int], steps: int):
        self._pairs, self._steps = pairs, steps
        self._step = self._level = self._reviews = 0
        self._last: list[tuple[int, int]] = []
        self.began = [0]
        """The step at which each number of pairs began, for those that did."""

    def next_pairs(self) -> int:
        """Returns the number of pairs of the step at hand."""
        if self._level and self._step % _REVIEW_EVERY == _REVIEW_EVERY - 1:
            return self._pairs[self._reviews % self._level]
        return self._pairs[self._level]

    def done(self, pairs: int, right: int, answers: int) -> None:
        """Reports the right answers and all answers of the step at hand, which ends it."""
        self._step += 1
        if pairs == self._pairs[self._level]:
            self._last = [*self._last, (right, answers)][-_LAST_STEPS:]
        else:
            self._reviews += 1
        learnt = len(self._last) == _LAST_STEPS and (
            sum(right for right, _ in self._last)
            > _ADVANCE_AT * sum(answers for _, answers in self._last)
        )
        over = self._step * len(self._pairs) >= self._steps * (self._level + 1)
        if self._level + 1 < len(self._pairs) and (learnt or over):
            self._level += 1
            self._last = []
            self.began.append(self._step)
