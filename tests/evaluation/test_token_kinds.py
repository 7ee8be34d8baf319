"""Kinds of tokens: rare pairs that a document had before, far or near."""

import numpy as np

from infini_ds.data.store import Split
from infini_ds.evaluation.token_kinds import KINDS, token_kinds


def kinds_of(training: list[int], document: list[int], n: int = 4) -> list[str]:
    split = Split(np.array(training, dtype=np.uint16), np.array([0, len(training)]))
    (kinds,) = token_kinds(split, [np.array(document, dtype=np.uint16)], 100, n)
    return [KINDS[kind] for kind in kinds]


def test_a_pair_is_recalled_from_farther_back_than_a_segment():
    found = kinds_of([0], [1, 2, 7, 1, 2, 8, 9, 7, 1, 2], n=4)
    #  pairs: 12 27 71 12 (3 back) 28 89 97 71 (6 back) 12 (5 back)
    assert found == [
        "other", "other", "other", "near", "other", "other", "other", "recalled", "recalled"
    ]  # fmt: skip


def test_what_counts_is_where_the_pair_stood_last():
    assert kinds_of([0], [1, 2, 3, 4, 5, 1, 2, 1, 2], n=3)[-3:] == ["recalled", "other", "near"]


def test_pairs_that_are_common_in_training_are_not_recalled():
    document = [1, 2, *range(10, 30), 1, 2]
    assert kinds_of([5, 6] * 50_000, document)[-1] == "recalled"
    assert kinds_of([5, 6] * 50_000 + [1, 2], document)[-1] == "recalled"  # 1 of 100,000
    assert kinds_of([5, 6] * 50_000 + [1, 2] * 3, document)[-1] == "other"  # 3 of 100,000


def test_pairs_of_the_largest_vocabularies_do_not_run_over():
    document = np.array([131071, 131070, 5, 131071, 131070], dtype=np.uint32)
    split = Split(document, np.array([0, 5]))
    (kinds,) = token_kinds(split, [document], 131072, 2)
    assert [KINDS[kind] for kind in kinds] == ["other"] * 4  # two of four pairs are not rare
    (kinds,) = token_kinds(Split(document[:1], np.array([0, 1])), [document], 131072, 2)
    assert KINDS[kinds[-1]] == "recalled"
