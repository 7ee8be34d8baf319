"""Documents of associative recall: whole pairs, every one asked, and labels that are right."""

import numpy as np
import pytest

from infini_ds.data.recall import (
    FILLER,
    Levels,
    Size,
    draw_documents,
    draw_filler,
    recall_random,
    vocabulary,
)
from infini_ds.layout import IGNORE_INDEX

SIZES = [
    pytest.param(Size(1, 2, 96), id="one_pair_fills_a_segment"),
    pytest.param(Size(4, 64, 96), id="few"),
    pytest.param(Size(32, 64, 96), id="questions_fill_a_segment"),
    pytest.param(Size(96, 64, 96), id="all_keys"),
    pytest.param(Size(40, 7, 96), id="odd_segments"),
    pytest.param(Size(256, 64, 256), id="many"),
]
each_size = pytest.mark.parametrize("size", SIZES)


def pairs_of(tokens: np.ndarray, size: Size) -> list[tuple[int, int, int]]:
    """The place, key and value of each pair of a document."""
    is_key = (tokens >= FILLER) & (tokens < FILLER + size.keys)
    return [(int(i), int(tokens[i]), int(tokens[i + 1])) for i in np.flatnonzero(is_key)]


@each_size
def test_every_key_that_is_asked_was_stated_with_its_value(size):
    documents = draw_documents(recall_random(0), size, 5)
    for stated, asked, labels in zip(*documents, strict=True):
        known = {key: value for _, key, value in pairs_of(stated, size)}
        questions = pairs_of(asked, size)
        assert len(known) == len(questions) == size.pairs
        assert {key: value for _, key, value in questions} == known
        labelled = {place: value for place, _, value in questions}
        assert dict(enumerate(labels[labels != IGNORE_INDEX])) == dict(enumerate(labelled.values()))
        assert list(np.flatnonzero(labels != IGNORE_INDEX)) == list(labelled)


@each_size
def test_no_pair_is_cut_and_the_rest_is_filler(size):
    n = size.segment_length
    documents = draw_documents(recall_random(1), size, 5)
    assert documents.stated.shape == (5, size.stating_segments * n)
    assert documents.asked.shape == documents.labels.shape == (5, size.asking_segments * n)
    for tokens in (*documents.stated, *documents.asked):
        found = pairs_of(tokens, size)
        for place, _, value in found:
            assert place % n != n - 1
            assert FILLER + size.keys <= value < vocabulary(size.keys)
        assert (tokens < FILLER).sum() == len(tokens) - 2 * size.pairs
    assert size.tokens(3) == documents.stated.shape[1] + 3 * n + documents.asked.shape[1]


def test_places_orders_keys_and_values_are_random():
    size = Size(4, 64, 96)
    documents = draw_documents(recall_random(2), size, 2000)
    stated = [pairs_of(tokens, size) for tokens in documents.stated]
    asked = [pairs_of(tokens, size) for tokens in documents.asked]
    places = np.array([place for pairs in stated for place, _, _ in pairs])
    counts = np.bincount(places, minlength=3 * 64).reshape(3, 64)
    assert (counts[:, -1] == 0).all()  # a key there would be cut from its value
    assert counts[:, :-1].min() > 15  # 42 on average
    same = np.mean([a[0][1] == b[0][1] for a, b in zip(stated, asked, strict=True)])
    assert same == pytest.approx(1 / 4, abs=0.04)
    keys = np.array([key for pairs in stated for _, key, _ in pairs])
    values = np.array([value for pairs in stated for _, _, value in pairs])
    assert set(keys) == set(range(64, 160))
    assert set(values) == set(range(160, 256))


def test_documents_depend_on_the_seed_alone():
    size = Size(16, 64, 96)
    first, again, other = (draw_documents(recall_random(0, s), size, 3) for s in (1, 1, 2))
    for one, same, different in zip(first, again, other, strict=True):
        assert (one == same).all()
        assert (one != different).any()
    filler = draw_filler(recall_random(3), 2, 1000)
    assert filler.min() == 0
    assert filler.max() == FILLER - 1


def test_bytes_suffice_for_96_keys():
    assert vocabulary(96) == 256


@pytest.mark.parametrize("size", [Size(97, 64, 96), Size(0, 64, 96), Size(1, 1, 96)])
def test_documents_that_cannot_be_are_refused(size):
    with pytest.raises(ValueError, match="takes 1 to 96 pairs"):
        draw_documents(recall_random(0), size, 1)


def test_next_number_of_pairs_follows_once_answers_are_right():
    levels = Levels([4, 16], 1000)
    for _ in range(19):
        assert levels.next_pairs() == 4
        levels.done(4, 10, 10)
    assert levels.began == [0]
    levels.done(4, 10, 10)
    assert levels.began == [0, 20]
    assert [step(levels) for _ in range(10)] == [16, 16, 16, 16, 4, 16, 16, 16, 16, 4]


def step(levels: Levels) -> int:
    """Makes a step without a right answer; its number of pairs."""
    pairs = levels.next_pairs()
    levels.done(pairs, 0, 1)
    return pairs


def test_next_number_of_pairs_follows_once_its_steps_are_over():
    levels = Levels([2, 4, 8], 90)
    made = [step(levels) for _ in range(90)]
    assert levels.began == [0, 30, 60]
    assert made[:30] == [2] * 30
    assert set(made[30:60]) == {2, 4}
    assert made[60:].count(2) == made[60:].count(4) == 3


def test_exactly_nine_tenths_are_not_enough():
    levels = Levels([4, 16], 1000)
    for _ in range(100):
        levels.done(4, 9, 10)
    assert levels.began == [0]
