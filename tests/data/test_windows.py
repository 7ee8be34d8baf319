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
