import json
import time
from typing import Any

import numpy as np
import pytest

from infini_ds.data.lanes import Lanes, held_out_plans
from infini_ds.errors import UserError

RANDOM = np.random.default_rng(0)
# name: (lengths, segment_length, window_segments, batch_size)
CORPORA = {
    "mixed": (RANDOM.integers(2, 60, 40), 8, 3, 5),
    "one_token_texts": (np.full(30, 2), 4, 4, 3),
    "exact_multiples": (np.full(20, 17), 8, 2, 4),
    "one_long_document": (np.array([1000]), 8, 2, 3),
    "fewer_documents_than_lanes": (np.array([50, 2, 33]), 4, 1, 7),
    "long_and_tiny": (np.array([400] + [2] * 50), 8, 5, 4),
}


@pytest.fixture(params=CORPORA.values(), ids=list(CORPORA))
def corpus(request):
    return request.param


def walk(plans):
    """Per lane, the (document, offset, length, start) of each segment in order of time."""
    columns = [
        np.concatenate(arrays, axis=1) for arrays in zip(*(p[:4] for p in plans), strict=True)
    ]
    return [
        list(zip(*(column[lane].tolist() for column in columns), strict=True))
        for lane in range(len(columns[0]))
    ]


def visits(segments):
    """Splits a lane's segments into the documents it visits."""
    found = []
    for segment in segments:
        if segment[3]:
            found.append([])
        found[-1].append(segment)
    return found


def taken_in_order(plans):
    """Documents in the order in which lanes took them from the queue."""
    documents, _, _, starts = (
        np.concatenate(arrays, axis=1) for arrays in zip(*(p[:4] for p in plans), strict=True)
    )
    return documents.T[starts.T].tolist()


def whole_epochs(corpus, epochs, seed=0):
    """Plans that take at least `epochs` epochs of documents from the queue."""
    lengths, n, k, batch = corpus
    lanes = Lanes(lengths, n, k, batch, seed)
    plans = []
    while not plans or len(taken_in_order(plans)) < epochs * len(lengths):
        plans.append(lanes.next_plan())
    return plans


def test_next_plan_takes_each_document_once_an_epoch(corpus):
    count = len(corpus[0])
    taken = taken_in_order(whole_epochs(corpus, 3))
    for epoch in range(3):
        assert sorted(taken[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_next_plan_gives_a_new_order_every_epoch_and_seed():
    corpus = CORPORA["mixed"]
    count = len(corpus[0])
    taken = taken_in_order(whole_epochs(corpus, 2))
    assert taken[:count] != taken[count : 2 * count]
    assert taken[:count] == taken_in_order(whole_epochs(corpus, 1))[:count]
    assert taken[:count] != taken_in_order(whole_epochs(corpus, 1, seed=1))[:count]
    assert taken[:count] != taken_in_order(whole_epochs(corpus, 1, seed=-1))[:count]


def test_next_plan_order_is_that_of_other_machines():
    # A run resumed elsewhere must go on in the same order: these numbers must never change.
    lanes = Lanes(np.full(10, 9), 8, 10, 1, seed=7)
    assert lanes.next_plan().documents.tolist() == [[8, 4, 3, 6, 2, 1, 0, 5, 9, 7]]


def test_next_plan_reads_documents_whole_in_one_lane_and_in_order(corpus):
    lengths, n, _, _ = corpus
    for lane in walk(whole_epochs(corpus, 2)):
        assert lane[0][3]
        *whole, last = visits(lane)
        for visit in [*whole, last]:
            document = visit[0][0]
            positions = int(lengths[document]) - 1
            expected = [
                (document, at, min(n, positions - at), at == 0) for at in range(0, positions, n)
            ]
            # The last document of a lane may go on in the next window.
            assert visit == (expected[: len(visit)] if visit is last else expected)


def test_next_plan_leaves_no_lane_idle(corpus):
    plans = whole_epochs(corpus, 2)
    for plan in plans:
        assert plan.lengths.shape == (corpus[3], corpus[2])
        assert plan.lengths.min() >= 1
        assert plan.lengths.max() <= corpus[1]
        assert plan.num_tokens == plan.lengths.sum()


def test_next_plan_does_not_depend_on_window_segments():
    lengths, n, _, batch = CORPORA["mixed"]
    short, long = Lanes(lengths, n, 1, batch, 0), Lanes(lengths, n, 6, batch, 0)
    assert walk([short.next_plan() for _ in range(60)]) == walk(
        [long.next_plan() for _ in range(10)]
    )
    assert short.epoch == long.epoch


def test_epoch_is_exact_when_documents_end_together():
    lengths, n, k, batch = CORPORA["exact_multiples"]  # 20 documents of 2 segments, 8 a step
    lanes = Lanes(lengths, n, k, batch, 0)
    for step in range(10):
        assert lanes.epoch == step / 5
        lanes.next_plan()
    assert lanes.state()["queue"] == [1, 20]


def test_load_state_at_every_step_goes_on_equally(corpus):
    lanes = Lanes(*corpus, seed=3)
    states, plans = [], []
    for _ in range(25):
        states.append(json.loads(json.dumps(lanes.state())))
        plans.append(lanes.next_plan())
    for step in range(22):
        resumed = Lanes(*corpus, seed=3)
        resumed.next_plan()
        resumed.load_state(states[step])
        assert resumed.state() == states[step]
        assert walk([resumed.next_plan() for _ in range(3)]) == walk(plans[step : step + 3])
        assert resumed.step == step + 3


def test_states_of_before_there_were_mixtures_are_understood(corpus):
    lanes, resumed = Lanes(*corpus, seed=3), Lanes(*corpus, seed=3)
    lanes.next_plan()
    state = lanes.state()
    state["epoch"], state["next"] = state.pop("queue")
    resumed.load_state(state)
    assert walk([resumed.next_plan()]) == walk([lanes.next_plan()])


def test_seek_equals_stepping(corpus):
    stepped, sought = Lanes(*corpus, seed=3), Lanes(*corpus, seed=3)
    for step in range(40):
        sought.seek(step)
        assert sought.state() == stepped.state()
        assert walk([sought.next_plan()]) == walk([stepped.next_plan()])


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"batch_size": 4}, "train.batch_size"),
        ({"seed": 1}, "seed"),
        ({"segment_length": 4}, "model.segment_length"),
        ({"lengths": np.full(41, 30)}, "data.store: documents"),
        ({"lengths": np.full(40, 30)}, "data.store: tokens"),
    ],
    ids=["batch_size", "seed", "segment_length", "documents", "tokens"],
)
def test_load_state_refuses_another_run(change, setting):
    names = ("lengths", "segment_length", "window_segments", "batch_size")
    settings: dict[str, Any] = dict(zip(names, CORPORA["mixed"], strict=True)) | {"seed": 0}
    state = Lanes(**settings).state()
    with pytest.raises(UserError, match=rf"^{setting}"):
        Lanes(**(settings | change)).load_state(state)


def test_load_state_accepts_another_window_length():
    lengths, n, _, batch = CORPORA["mixed"]
    before, after = Lanes(lengths, n, 2, batch, 0), Lanes(lengths, n, 4, batch, 0)
    before.next_plan()
    after.load_state(before.state())
    assert walk([after.next_plan()]) == walk([before.next_plan(), before.next_plan()])


def test_lanes_refuse_a_corpus_smaller_than_a_step():
    Lanes(np.array([64 * 8 + 1]), 8, 16, 4, 0)
    with pytest.raises(UserError, match=r"^train\.window_segments \(16\) x .* = 64 .* only 63 "):
        Lanes(np.array([63 * 8 + 1]), 8, 16, 4, 0)


def test_lanes_read_a_document_of_ten_million_tokens():
    lanes = Lanes(np.array([10_000_000, 2, 2]), 2048, 16, 4, 0)
    assert lanes.total_segments == 4883 + 2
    lanes.seek(300)
    tail = [lanes.next_plan() for _ in range(30)]
    long = [segment for lane in walk(tail) for segment in lane if segment[0] == 0]
    assert max(offset + length for _, offset, length, _ in long) == 9_999_999


def test_seek_over_a_million_documents_is_fast():
    lanes = Lanes(np.random.default_rng(0).integers(2, 30_000, 1_000_000), 512, 16, 1024, 1)
    began = time.process_time()
    lanes.seek(lanes.total_segments // (1024 * 16))
    assert time.process_time() - began < 10  # about 0.7 s on an idle core
    assert 0.999 < lanes.epoch <= 1


@pytest.mark.parametrize("max_segments", [0, 1, 12, 10_000])
def test_held_out_plans_read_the_first_documents_once(corpus, max_segments):
    lengths, n, k, batch = corpus
    plans = held_out_plans(lengths, n, k, batch, max_segments)
    seen = {}
    for lane in walk(plans):
        while lane and lane[-1][2] == 0:  # what a lane has after its last document
            assert lane.pop() == (0, 0, 0, True)
        for visit in visits(lane):
            document = visit[0][0]
            assert document not in seen
            seen[document] = visit
    assert sorted(seen) == list(range(len(seen)))
    for document, visit in seen.items():
        positions = int(lengths[document]) - 1
        assert [(at, length) for _, at, length, _ in visit] == [
            (at, min(n, positions - at)) for at in range(0, positions, n)
        ]
    segments = -(-(np.asarray(lengths) - 1) // n)
    if max_segments == 0:
        assert len(seen) == len(lengths)
    else:
        assert len(seen) == 1 or segments[: len(seen)].sum() <= max_segments
        assert len(seen) == len(lengths) or segments[: len(seen) + 1].sum() > max_segments


def test_held_out_plans_end_with_the_last_token(corpus):
    lengths, n, k, batch = corpus
    plans = held_out_plans(lengths, n, k, batch, 0)
    assert sum(plan.num_tokens for plan in plans) == sum(lengths) - len(lengths)
    assert all(plan.num_tokens for plan in plans)
    assert all(plan.lengths.shape == (batch, k) for plan in plans)


def test_held_out_plans_spread_documents_over_lanes():
    plans = held_out_plans(np.full(8, 17), 8, 2, 4, 0)
    assert len(plans) == 2
    assert sorted(plans[0].documents[:, 0].tolist()) == [0, 1, 2, 3]
    assert sorted(plans[1].documents[:, 0].tolist()) == [4, 5, 6, 7]


def test_held_out_plans_refuse_an_empty_split():
    with pytest.raises(UserError, match=r"held-out split is empty"):
        held_out_plans(np.empty(0, dtype=np.int64), 8, 2, 4, 0)
