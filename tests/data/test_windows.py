import numpy as np
import pytest
import torch

from infini_ds.data.lanes import Lanes, Plan, held_out_plans
from infini_ds.data.store import Split
from infini_ds.data.windows import answers_right, read_windows, total_weight
from infini_ds.layout import Layout

LENGTHS = np.array([12, 2, 9, 30, 5, 17])
N, K, BATCH = 4, 3, 4


@pytest.fixture
def split():
    """Token t of document d is 100 d + t."""
    data = np.concatenate([100 * d + np.arange(length) for d, length in enumerate(LENGTHS)])
    return Split(data.astype(np.uint16), np.concatenate([[0], np.cumsum(LENGTHS)]))


def test_read_windows_label_of_a_segments_last_token_is_in_the_next(split):
    plan = Plan(
        documents=np.array([[3, 3, 1]]),
        offsets=np.array([[4, 8, 0]]),
        lengths=np.array([[4, 4, 1]], dtype=np.int32),
        starts=np.array([[False, False, True]]),
    )
    tokens, labels, layout, weights, _ = read_windows(split, plan, slice(None), N)
    assert tokens.tolist() == [[304, 305, 306, 307, 308, 309, 310, 311, 100, 0, 0, 0]]
    assert labels.tolist() == [[305, 306, 307, 308, 309, 310, 311, 312, 101, -100, -100, -100]]
    assert layout.starts.tolist() == [[False, False, True]]
    assert layout.lengths.tolist() == [[4, 4, 1]]
    assert layout.begins is None
    assert weights.tolist() == [[1.0] * 9 + [0.0] * 3]
    assert weights.dtype == torch.float32
    assert (tokens.dtype, labels.dtype) == (torch.int64, torch.int64)
    assert (layout.starts.dtype, layout.lengths.dtype) == (torch.bool, torch.int32)


def test_read_windows_pairs_each_token_with_its_successor(split):
    lanes = Lanes(split.lengths, N, K, BATCH, 0)
    for _ in range(20):
        plan = lanes.next_plan()
        tokens, labels, layout, weights, _ = read_windows(split, plan, slice(None), N)
        assert torch.equal(weights, (labels != -100).float())
        assert total_weight(split, plan) == plan.num_tokens
        assert tokens.shape == labels.shape == (BATCH, K * N)
        valid = labels != -100
        assert int(valid.sum()) == plan.num_tokens == int(layout.lengths.sum())
        assert torch.equal(labels[valid], tokens[valid] + 1)
        assert not tokens[~valid].any()


def test_read_windows_of_held_out_plans_have_each_label_once(split):
    labels = torch.cat(
        [
            read_windows(split, plan, slice(None), N).labels.flatten()
            for plan in held_out_plans(split.lengths, N, K, BATCH, 0)
        ]
    )
    expected = [100 * d + t for d, length in enumerate(LENGTHS) for t in range(1, length)]
    assert sorted(labels[labels != -100].tolist()) == expected


@pytest.mark.parametrize("lanes", [slice(1, 3), range(1, 3), range(3, 0, -2)], ids=str)
def test_read_windows_of_some_lanes_are_rows_of_all(split, lanes):
    plan = Lanes(split.lengths, N, K, BATCH, 0).next_plan()
    rows = list(lanes) if isinstance(lanes, range) else lanes
    every, some = read_windows(split, plan, slice(None), N), read_windows(split, plan, lanes, N)
    assert torch.equal(some.tokens, every.tokens[rows])
    assert torch.equal(some.labels, every.labels[rows])
    assert torch.equal(some.weights, every.weights[rows])
    assert torch.equal(some.layout.starts, every.layout.starts[rows])
    assert torch.equal(some.layout.lengths, every.layout.lengths[rows])


def packed_lanes(split):
    """Lanes of segments of 16 tokens, into which several of the documents fit."""
    return Lanes(split.lengths, 16, 1, 3, 0, packing=True)


def expected_of_segment(plan, lane, column, lengths, n, weighted):
    """Tokens, labels, weights and beginnings of one segment, as the fixtures make them."""
    tokens, labels, weights, begins = [0] * n, [-100] * n, [0.0] * n, [n] * n
    where = (lane, column)
    parts = [(0, *(int(part[where]) for part in plan[:3]))]
    segment = lane * plan.documents.shape[1] + column
    for own, begin, document, length in zip(*plan.guests, strict=True):
        if own == segment:
            assert length == lengths[document] - 1
            parts.append((int(begin), int(document), 0, int(length)))
    for begin, document, offset, length in parts:
        for i in range(length):
            at, token = begin + i, 100 * document + offset + i
            assert begins[at] == n  # nothing lies there yet
            tokens[at], labels[at], begins[at] = token, token + 1, begin
            weights[at] = token + 1.0 if weighted else 1.0
    return tokens, labels, weights, begins


@pytest.mark.parametrize("lanes", [slice(None), slice(1, 3), range(2, 0, -1)], ids=str)
@pytest.mark.parametrize("name", ["split", "weighted"])
def test_read_windows_of_packed_segments(request, name, lanes):
    split, n = request.getfixturevalue(name), 16
    planned = Lanes(split.lengths, n, 2, 2, 0, packing=True) if lanes == slice(None) else (
        packed_lanes(split)
    )  # fmt: skip
    guests = 0
    for _ in range(20):
        plan = planned.next_plan()
        assert plan.guests is not None
        guests += len(plan.guests.documents)
        windows = read_windows(split, plan, lanes, n)
        assert windows.layout.begins is not None
        assert windows.layout.begins.dtype == torch.int32
        found = (
            windows.tokens, windows.labels, windows.weights, windows.layout.begins.flatten(1),
        )  # fmt: skip
        batch, segments = plan.documents.shape
        for row, lane in enumerate(range(batch)[lanes] if isinstance(lanes, slice) else lanes):
            for column in range(segments):
                expected = expected_of_segment(
                    plan, lane, column, split.lengths, n, name == "weighted"
                )
                own = slice(column * n, (column + 1) * n)
                assert tuple(part[row, own].tolist() for part in found) == expected
        if lanes == slice(None):
            assert total_weight(split, plan) == float(windows.weights.sum())
            assert plan.num_tokens == int((windows.labels >= 0).sum())
    assert guests > 20


def test_packed_windows_have_beginnings_even_where_nothing_is_packed(split):
    plan = Lanes(np.full(6, 17), 16, 1, 3, 0, packing=True).next_plan()
    assert plan.guests is not None
    assert not len(plan.guests.documents)
    split = Split(split.data, np.arange(7))
    begins = read_windows(split, plan, slice(None), 16).layout.begins
    assert begins is not None
    assert begins.tolist() == [[[0] * 16]] * 3


def test_chunks_and_copies_of_packed_windows_are_their_parts(split):
    plan = Lanes(split.lengths, 16, 2, 2, 0, packing=True).next_plan()
    windows = read_windows(split, plan, slice(None), 16).to(torch.device("cpu"))
    for index in range(2):
        part = windows.chunk(2, index)
        assert torch.equal(part.tokens, windows.tokens[:, 16 * index : 16 * (index + 1)])
        assert part.layout.begins is not None
        assert windows.layout.begins is not None
        assert torch.equal(part.layout.begins, windows.layout.begins[:, index : index + 1])
        assert torch.equal(part.layout.lengths, windows.layout.lengths[:, index : index + 1])


@pytest.fixture
def weighted(split):
    """The weight of token t of document d is 100 d + t, as the token is."""
    return Split(split.data, split.offsets, split.data.astype(np.float32))


def test_read_windows_weights_are_those_of_the_labels(weighted):
    lanes = Lanes(weighted.lengths, N, K, BATCH, 0)
    for _ in range(20):
        plan = lanes.next_plan()
        windows = read_windows(weighted, plan, slice(None), N)
        assert torch.equal(windows.weights, windows.labels.clamp(min=0).float())
        assert total_weight(weighted, plan) == float(windows.weights.sum())


def test_total_weight_of_a_finite_pass_is_that_of_all_labels(weighted):
    plans = held_out_plans(weighted.lengths, N, K, BATCH, 0)
    begins = 100 * np.arange(len(LENGTHS))  # weights of BOS
    expected = float(weighted.weights.sum() - begins.sum())
    assert sum(total_weight(weighted, plan) for plan in plans) == expected


def test_answers_are_right_where_every_weighted_label_is_likely():
    weights = torch.ones(2, 12)  # three segments of 4 in each of two lanes
    weights[0, 2:4] = weights[0, 9:11] = weights[1, 5:7] = 50.0
    losses = torch.full((2, 12), 9.0)
    losses[0, 2:4] = losses[1, 5:7] = 0.6
    losses[0, 9], losses[0, 10] = 0.6, 0.7  # exp(-0.7) is below one half
    layout = Layout(torch.ones(2, 3, dtype=torch.bool), torch.full((2, 3), 4))
    assert answers_right(losses, weights, layout).tolist() == [2, 3]


def test_answers_of_a_segment_are_counted_one_by_one():
    weights = torch.ones(2, 12)
    # Two answers in one segment, one cut by its end, and one at the end of another lane.
    weights[0, 0] = weights[0, 2:6] = weights[1, 11] = 9.0
    losses = torch.full((2, 12), 9.0)
    layout = Layout(torch.ones(2, 3, dtype=torch.bool), torch.full((2, 3), 4))
    for wrong, right in (([], 4), ([0], 3), ([3], 3), ([2, 3], 3), ([2, 5], 2), ([1, 6], 4)):
        losses[0, :6] = losses[1, 11] = 0.6
        losses[0, wrong] = 0.7
        assert answers_right(losses, weights, layout).tolist() == [right, 4]
    assert answers_right(losses, torch.ones(2, 12), layout).tolist() == [0, 0]
