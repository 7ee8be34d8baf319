import json
from typing import Any

import numpy as np
import pytest

from infini_ds.config import CurriculumConfig
from infini_ds.data.curriculum import CurriculumLanes
from infini_ds.data.lanes import Lanes
from infini_ds.data.opening import open_data
from infini_ds.data.prepare import prepare
from infini_ds.errors import UserError
from tests import tiny

N, K, BATCH = 8, 8, 3
COUNTS = {2: 20, 4: 15, 8: 10}
# Documents of 2, 4 and 8 segments, whole ones but the last of each, and others of 3.
LENGTHS = np.random.default_rng(0).permutation(
    [s * N + 1 for s, count in COUNTS.items() for _ in range(count - 1)]
    + [s * N - 2 for s in COUNTS]
    + [3 * N + 1] * 5
)
SEGMENTS = -(-(LENGTHS - 1) // N)


def lanes_of(seed=0, **settings):
    settings = {"segments": [2, 4, 8], "window": 3, "advance_at": 0.9} | settings
    return CurriculumLanes(LENGTHS, N, K, BATCH, seed, CurriculumConfig(**settings))


def length_of(plan):
    """Length of the documents of a plan, which is the same for all."""
    (length,) = set(SEGMENTS[plan.documents].flat)
    return int(length)


def lengths_read(lanes, answers):
    """Lengths of the documents of each step, when the answers go as given."""
    lengths = []
    for answer in answers:
        lengths.append(length_of(lanes.next_plan()))
        lanes.observe(answer)
    return lengths


@pytest.mark.parametrize("level", [0, 1, 2])
def test_next_plan_fills_the_window_with_whole_documents(level):
    lanes = lanes_of(review=0.0)
    lanes.level = level
    length = [2, 4, 8][level]
    for _ in range(10):
        plan = lanes.next_plan()
        assert length_of(plan) == length
        assert all(array.shape == (BATCH, K) for array in plan[:4])
        assert plan.guests is None
        for lane in range(BATCH):
            for begin in range(0, K, length):
                of_document = slice(begin, begin + length)
                (document,) = set(plan.documents[lane, of_document].tolist())
                assert plan.offsets[lane, of_document].tolist() == list(range(0, length * N, N))
                assert plan.starts[lane, of_document].tolist() == [True] + [False] * (length - 1)
                assert plan.lengths[lane, of_document].sum() == LENGTHS[document] - 1
        assert plan.lengths.dtype == np.int32
        assert plan.num_tokens <= BATCH * K * N


@pytest.mark.parametrize("level", [0, 1, 2])
def test_next_plan_takes_each_document_of_a_length_once_an_epoch(level):
    lanes = lanes_of(review=0.0)
    lanes.level = level
    count = list(COUNTS.values())[level]
    taken = []
    while len(taken) < 3 * count:
        plan = lanes.next_plan()
        taken += plan.documents[plan.starts].tolist()
    epochs = [taken[i * count : (i + 1) * count] for i in range(3)]
    assert all(len(set(epoch)) == count for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_order_is_a_function_of_the_seed():
    first, same, other = (lanes_of(seed).next_plan().documents.tolist() for seed in (0, 0, 1))
    assert first == same
    assert first != other


def test_next_plan_order_is_that_of_other_machines():
    # A run resumed elsewhere must go on in the same order: these numbers must never change.
    lengths = np.full(10, 2 * N + 1)
    lanes = CurriculumLanes(lengths, N, 20, 1, 7, CurriculumConfig(segments=[2]))
    assert lanes.next_plan().documents[0, ::2].tolist() == [0, 3, 5, 1, 8, 4, 9, 2, 6, 7]


def test_observe_advances_after_a_window_of_right_answers():
    lanes = lanes_of(review=0.0)
    assert lanes.level_segments == 2
    # The mean over 3 steps is high enough after the fifth step, and then after three more.
    answers = [1.0, 0.5, 1.0, 0.8, 0.95, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert lengths_read(lanes, answers) == [2] * 5 + [4] * 3 + [8] * 4
    assert (lanes.level, lanes.level_segments, lanes.step) == (2, 8, 12)
    assert lanes.right_answers == 1


def test_observe_needs_a_full_window():
    lanes = lanes_of(review=0.0, window=5)
    assert lengths_read(lanes, [1.0] * 6) == [2] * 5 + [4]


def test_right_answers_are_those_of_the_latest_steps():
    lanes = lanes_of(review=0.0)
    assert lanes.right_answers == 0
    lengths_read(lanes, [0.0, 0.2])
    assert lanes.right_answers == pytest.approx(0.1)
    lengths_read(lanes, [0.2, 0.2])
    assert lanes.right_answers == pytest.approx(0.2)


def test_review_reads_the_earlier_lengths_in_turn_every_second_step():
    lanes = lanes_of(window=2)
    assert lengths_read(lanes, [1.0] * 2) == [2, 2]  # nothing is earlier
    assert lengths_read(lanes, [0.0] * 4 + [1.0] * 3) == [4, 2, 4, 2, 4, 2, 4]
    assert lengths_read(lanes, [0.0] * 8) == [8, 2, 8, 4, 8, 2, 8, 4]


def test_review_of_a_quarter_is_every_fourth_step():
    lanes = lanes_of(window=1, review=0.25)
    assert lengths_read(lanes, [1.0]) == [2]
    assert lengths_read(lanes, [0.0] * 8) == [4, 4, 4, 2, 4, 4, 4, 2]


def test_observe_takes_no_account_of_reviews():
    lanes = lanes_of(window=2)
    lengths_read(lanes, [1.0] * 2)
    for _ in range(20):
        answer = 1.0 if length_of(lanes.next_plan()) == 2 else 0.5
        lanes.observe(answer)
    assert lanes.level == 1
    assert lanes.right_answers == 0.5


def test_epoch_counts_segments_of_the_curriculum():
    lanes = lanes_of()
    for _ in range(10):
        lanes.next_plan()
    assert lanes.epoch == 10 * BATCH * K / sum(s * count for s, count in COUNTS.items())


# For each pair of segments and keys, as many documents as the next test needs.
PAIRS = {(2, 1): 6, (2, 3): 7, (4, 1): 8, (4, 3): 9, (8, 1): 4, (8, 3): 5}
MIXED = np.random.default_rng(2).permutation(
    [pair for pair, count in PAIRS.items() for _ in range(count)]
)


def lanes_of_keys(**settings):
    settings = {"segments": [2, 4, 8], "keys": [1, 3], "window": 2} | settings
    config = CurriculumConfig(**settings)
    return CurriculumLanes(MIXED[:, 0] * N + 1, N, K, BATCH, 0, config, MIXED[:, 1])


def pairs_read(lanes, answers):
    """The segments and keys of the documents of each step, when the answers go as given."""
    pairs = []
    for answer in answers:
        (pair,) = {tuple(MIXED[document].tolist()) for document in lanes.next_plan().documents.flat}
        pairs.append(pair)
        lanes.observe(answer)
    return pairs


def test_keys_come_one_after_another_at_the_first_length_and_in_turn_at_longer_ones():
    lanes = lanes_of_keys(review=0.0)
    assert (lanes.level_segments, lanes.level_keys) == (2, 1)
    assert pairs_read(lanes, [0.0, 1.0, 1.0]) == [(2, 1)] * 3
    assert (lanes.level_segments, lanes.level_keys) == (2, 3)
    assert pairs_read(lanes, [1.0, 1.0]) == [(2, 3)] * 2
    assert (lanes.level_segments, lanes.level_keys) == (4, 3)
    assert pairs_read(lanes, [0.0, 0.0, 0.0, 1.0, 1.0]) == [(4, 1), (4, 3), (4, 1), (4, 3), (4, 1)]
    assert pairs_read(lanes, [1.0] * 3) == [(8, 1), (8, 3), (8, 1)]
    assert lanes.level == 3


def test_review_reads_earlier_levels_in_turn_and_their_keys_in_turn():
    lanes = lanes_of_keys()
    pairs_read(lanes, [1.0] * 2)
    assert pairs_read(lanes, [1.0] * 3) == [(2, 3), (2, 1), (2, 3)]
    assert pairs_read(lanes, [0.0] * 4) == [(4, 1), (2, 1), (4, 3), (2, 3)]
    pairs_read(lanes, [1.0] * 3)
    assert lanes.level == 3
    found = pairs_read(lanes, [0.0] * 12)
    assert found[::2] == [(8, 1), (8, 3)] * 3
    assert found[1::2] == [(2, 1), (2, 3), (4, 1), (2, 1), (2, 3), (4, 3)]


def test_each_document_of_a_number_of_keys_is_taken_once_an_epoch():
    lanes = lanes_of_keys(review=0.0)
    lanes.level = 3
    taken = {1: [], 3: []}
    for step in range(40):
        plan = lanes.next_plan()
        taken[(1, 3)[step % 2]] += plan.documents[plan.starts].tolist()
    for keys, documents in taken.items():
        count = PAIRS[8, keys]
        assert set(documents) == set(np.flatnonzero(((8, keys) == MIXED).all(axis=1)).tolist())
        assert len(set(documents[:count])) == count
        assert documents[:count] != documents[count : 2 * count]
    assert lanes.epoch == 40 * BATCH * K / sum(s * count for (s, _), count in PAIRS.items())


def test_load_state_with_keys_goes_on_equally_at_every_step():
    lanes = lanes_of_keys()
    states, pairs = [], []
    for _ in range(30):
        states.append(json.dumps(lanes.state()))
        pairs += pairs_read(lanes, [1.0])
    assert lanes.level == 3
    for step, state in enumerate(states[:-3]):
        resumed = lanes_of_keys()
        resumed.load_state(json.loads(state))
        assert json.dumps(resumed.state()) == state
        assert pairs_read(resumed, [1.0] * 3) == pairs[step : step + 3]


def test_load_state_of_a_run_before_there_were_keys():
    lanes = lanes_of(review=0.0)
    lengths_read(lanes, [1.0] * 4)
    state = lanes.state()
    assert state.keys() == {
        "curriculum", "batch_size", "seed", "segment_length", "num_documents", "num_tokens",
        "step", "level", "level_step", "answers", "queues",
    }  # fmt: skip
    assert len(state["queues"]) == 3
    resumed = lanes_of(review=0.0)
    resumed.load_state(state)
    assert length_of(resumed.next_plan()) == length_of(lanes.next_plan()) == 4


@pytest.mark.parametrize(("mine", "saved"), [([1, 3], []), ([], [1, 3]), ([1, 3], [3])])
def test_load_state_refuses_other_keys(mine, saved):
    says = r"^train\.curriculum\.keys \(.*\) must be "
    with pytest.raises(UserError, match=says):
        lanes_of_keys(keys=mine).load_state(lanes_of_keys(keys=saved).state())


def test_curriculum_lanes_refuse_keys_without_documents():
    says = r"^train\.curriculum\.keys: data\.store has no document of 2 segments of .*8 with 2 pass"
    with pytest.raises(UserError, match=says):
        lanes_of_keys(keys=[1, 2])
    with pytest.raises(UserError, match=says):  # of a store that does not say how many there are
        CurriculumLanes(LENGTHS, N, K, BATCH, 0, CurriculumConfig(segments=[2], keys=[2]))


def test_open_data_gives_the_lanes_of_a_curriculum_of_keys(tmp_path):
    config = tiny.run_config(
        output_dir=str(tmp_path / "run"),
        model={"segment_length": 128},
        data={
            "source": "passkey",
            "store": str(tmp_path / "store"),
            "tokenizer": {"kind": "bytes"},
            "passkey": {
                "segment_length": 128, "segments": [2, 4], "documents": 20, "keys": [1, 2, 4],
                "form": "adjacent", "queries": "all",
            },
        },
        train={"window_segments": 4, "curriculum": {"segments": [2], "keys": [2, 4], "window": 1}},
    )  # fmt: skip
    prepare(config.data, workers=1)
    store, lanes = open_data(config)
    assert isinstance(lanes, CurriculumLanes)
    groups = store.split("train").groups
    assert groups is not None
    for keys in (2, 4):
        assert set(groups[lanes.next_plan().documents].flat) == {keys}
        lanes.observe(1.0)


def test_load_state_at_every_step_goes_on_equally():
    random = np.random.default_rng(1)
    answers = np.round(0.7 + 0.3 * random.random(60), 3).tolist()
    lanes = lanes_of(window=2, advance_at=0.85)
    states, plans, levels = [], [], []
    for answer in answers:
        states.append(json.dumps(lanes.state()))
        plans.append(lanes.next_plan())
        lanes.observe(answer)
        levels.append(lanes.level)
    assert levels[-1] == 2
    for step in range(57):
        resumed = lanes_of(window=2, advance_at=0.85)
        resumed.next_plan()
        resumed.load_state(json.loads(states[step]))
        assert resumed.state() == json.loads(states[step])
        for at in range(step, step + 3):
            plan = resumed.next_plan()
            assert all(map(np.array_equal, plan, plans[at]))
            resumed.observe(answers[at])
            assert resumed.level == levels[at]


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"batch_size": 4}, "train.batch_size"),
        ({"seed": 1}, "seed"),
        ({"segment_length": 4, "lengths": (LENGTHS - 1) // 2 + 1}, "model.segment_length"),
        ({"lengths": LENGTHS[LENGTHS != 3 * N + 1]}, "data.store: documents"),
        ({"config": CurriculumConfig(segments=[2, 4])}, "train.curriculum.segments"),
    ],
    ids=["batch_size", "seed", "segment_length", "documents", "curriculum"],
)
def test_load_state_refuses_another_run(change, setting):
    settings: dict[str, Any] = {
        "lengths": LENGTHS,
        "segment_length": N,
        "window_segments": K,
        "batch_size": BATCH,
        "seed": 0,
        "config": CurriculumConfig(segments=[2, 4, 8]),
    }
    state = CurriculumLanes(**settings).state()
    with pytest.raises(UserError, match=rf"^{setting} \(.*must be") as caught:
        CurriculumLanes(**(settings | change)).load_state(state)
    assert "\n" not in str(caught.value)


def test_load_state_refuses_a_run_with_or_without_a_curriculum():
    plain = Lanes(LENGTHS, N, K, BATCH, 0)
    with pytest.raises(UserError, match=r"^train\.curriculum\.segments \(None\) must be \[2, 4, 8"):
        plain.load_state(lanes_of().state())
    with pytest.raises(UserError, match=r"^train\.curriculum\.segments \(.*\) must be None"):
        lanes_of().load_state(plain.state())


def test_curriculum_lanes_refuse_a_length_without_documents():
    says = r"^train\.curriculum\.segments: data\.store has no document of 16 segments of model\."
    with pytest.raises(UserError, match=says) as caught:
        CurriculumLanes(LENGTHS, N, 16, BATCH, 0, CurriculumConfig())
    assert "\n" not in str(caught.value)


def test_open_data_gives_the_lanes_of_a_curriculum(tmp_path):
    passkey = {"segment_length": 128, "segments": [2, 4], "documents": 20}
    config = tiny.run_config(
        output_dir=str(tmp_path / "run"),
        model={"segment_length": 128},
        data={
            "source": "passkey",
            "store": str(tmp_path / "store"),
            "tokenizer": {"kind": "bytes"},
            "passkey": passkey,
        },
        train={"batch_size": 2, "window_segments": 4, "curriculum": {"segments": [2, 4]}},
    )
    prepare(config.data, workers=1)
    store, lanes = open_data(config)
    assert isinstance(lanes, CurriculumLanes)
    plan = lanes.next_plan()
    assert plan.num_tokens == 2 * 4 * 128
    assert set(store.split("train").lengths[plan.documents].flat) == {2 * 128 + 1}


@pytest.mark.parametrize(
    "record",
    [{"text": "x" * 31}, {"turns": [["x" * 30, 0.5], ["y", 1]]}],
    ids=["no_weights", "weights_up_to_1"],
)
def test_open_data_refuses_a_curriculum_without_answers(tmp_path, record):
    (tmp_path / "a.jsonl").write_text((json.dumps(record) + "\n") * 4)
    config = tiny.run_config(
        output_dir=str(tmp_path / "run"),
        model={"segment_length": 16},
        data={
            "source": "files",
            "files": [str(tmp_path / "a.jsonl")],
            "weighted_field": "turns" if "turns" in record else "",
            "held_out_fraction": 0.0,
            "store": str(tmp_path / "store"),
            "tokenizer": {"kind": "bytes"},
        },
        train={"window_segments": 2, "curriculum": {"segments": [2]}},
    )
    prepare(config.data, workers=1)
    says = r"^train\.curriculum: data\.store .* has no answers, which are text of a weight above 1"
    with pytest.raises(UserError, match=says) as caught:
        open_data(config)
    assert "\n" not in str(caught.value)
