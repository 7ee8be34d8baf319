import json

import numpy as np
import pytest

from infini_ds.data.document_queue import DocumentQueue
from infini_ds.data.mixed_queue import MixedQueue

RANDOM = np.random.default_rng(0)
SIZES = [RANDOM.integers(1, 900, count) for count in (400, 7, 5000)]
WEIGHTS = [3.0, 1.0, 0.5]
ALL = np.concatenate(SIZES)
BEGINS = np.cumsum([0, *map(len, SIZES)])


def queue(weights=WEIGHTS, seed=5):
    return MixedQueue(SIZES, weights, seed)


def corpora_of(documents):
    return np.searchsorted(BEGINS, documents, side="right") - 1


def tokens_of(documents):
    """Of each corpus, over time: int64 [documents, corpora]."""
    own = corpora_of(documents)[:, None] == np.arange(len(SIZES))
    return np.cumsum(own * ALL[documents][:, None], axis=0)


def test_tokens_are_in_proportion_to_the_weights_to_a_document():
    tokens = tokens_of(queue().take(3000)) / WEIGHTS
    longest = max(size.max() / weight for size, weight in zip(SIZES, WEIGHTS, strict=True))
    assert (tokens.max(axis=1) - tokens.min(axis=1)).max() <= longest


def test_each_corpus_is_read_in_the_order_of_its_own_queue():
    taken = queue().take(3000)
    for corpus, size in enumerate(SIZES):
        own = taken[corpora_of(taken) == corpus] - BEGINS[corpus]
        assert len(own) > len(SIZES[1])  # the small one is read more than once
        assert own.tolist() == DocumentQueue(len(size), 5).take(len(own)).tolist()


def test_one_corpus_is_read_as_without_a_mixture():
    alone = MixedQueue(SIZES[:1], [0.3], 5).take(1000)
    assert alone.tolist() == DocumentQueue(400, 5).take(1000).tolist()


@pytest.mark.parametrize("at_once", [1, 7, 3000])
def test_take_does_not_depend_on_how_many_are_taken_at_once(at_once):
    parts = queue()
    taken = np.concatenate([parts.take(at_once) for _ in range(-(-3000 // at_once))])
    assert taken[:3000].tolist() == queue().take(3000).tolist()


@pytest.mark.parametrize("after", [0, 1, 100, 2999])
def test_load_state_goes_on_from_there(after):
    whole, first, second = queue(), queue(), queue()
    taken = whole.take(6000)
    first.take(after)
    second.take(3)
    second.load_state(json.loads(json.dumps(first.state())))
    assert second.take(6000 - after).tolist() == taken[after:].tolist()


def test_new_weights_count_from_where_they_are_given():
    before, after = queue([1.0, 1.0, 1.0]), queue([1.0, 1.0, 8.0])
    before.take(2000)
    after.load_state(before.state())
    tokens = tokens_of(after.take(2000))[-1]
    assert tokens[2] / tokens[0] == pytest.approx(8, rel=0.02)
    again = queue([1.0, 1.0, 8.0])
    again.load_state(after.state())
    assert again.take(500).tolist() == after.take(500).tolist()


def test_epochs_are_passes_over_each_corpus():
    mixed = queue()
    taken = mixed.take(3000)
    counts = np.bincount(corpora_of(taken), minlength=3)
    passes = [count / len(size) for count, size in zip(counts, SIZES, strict=True)]
    assert mixed.epochs == pytest.approx(passes)
