import json
import time
from collections import Counter
from itertools import chain

import numpy as np
import pytest

from infini_ds.data import packing
from infini_ds.data.document_queue import DocumentQueue
from infini_ds.data.lanes import Lanes
from infini_ds.data.packing import PackedQueue, useful_share
from infini_ds.errors import UserError
from tests.data.packed_plans import expected_segments, lengths_like, segments_of

RANDOM = np.random.default_rng(0)
N = 8
# name: (lengths, segment_length, window_segments, batch_size)
CORPORA = {
    "mixed": (RANDOM.integers(2, 60, 40), N, 3, 5),
    "short": (RANDOM.integers(2, 9, 60), N, 2, 3),
    "one_token_texts": (np.full(60, 2), N, 2, 3),
    "exact_multiples": (np.full(20, 17), N, 2, 4),
    "one_token_more": (np.r_[np.full(10, N + 2), np.full(9, 2)], N, 2, 3),
    "one_long_document": (np.array([1000]), N, 2, 3),
    "fewer_documents_than_lanes": (np.array([50, 2, 33]), 4, 1, 7),
    "long_and_tiny": (np.array([400] + [2] * 50), N, 5, 4),
}
SHARES = {"one_corpus": (), "mixture": [(25, 1.0), (15, 3.0)]}


@pytest.fixture(params=CORPORA.values(), ids=list(CORPORA))
def corpus(request):
    return request.param


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 16)


def lanes_of(corpus, seed=3, shares=(), packing=True):
    return Lanes(*corpus, seed, shares, packing)


def random_corpus(random):
    """A small corpus with documents that just fill segments, and the layout of its lanes."""
    n = int(random.choice([1, 2, 5, 8, 16]))
    sizes = random.integers(1, random.choice([3, n + 2, 4 * n]) + 1, random.integers(1, 30))
    sizes[random.random(len(sizes)) < 0.2] = random.choice([1, n, n + 1, 2 * n])
    most = -(-int(sizes.sum()) // n)
    batch = int(random.integers(1, min(most, 6) + 1))
    window = int(random.integers(1, min(most // batch, 4) + 1))
    return sizes + 1, n, window, batch


def documents_taken(lanes, plans):
    """Documents with their guests in the order in which lanes took them, those last taken too."""
    found, expected = [], None
    for lane, segments in enumerate(segments_of(plans)):
        begun = None
        for slot, (document, offset, length, start, guests) in enumerate(segments):
            positions = int(lanes.positions[document])
            if start:
                begun = [(slot, lane), document, []]
                found.append(begun)
                assert offset == 0
            else:
                assert (document, offset) == expected
            expected = document, offset + length
            assert length == min(lanes.segment_length, positions - offset)
            own = [guest for _, guest, _ in guests]
            if offset + length == positions:
                begun[2] = own
            else:
                assert own == []
            end = length
            for begin, guest, size in guests:  # behind the host, whole, one after another
                assert (begin, size) == (end, lanes.positions[guest])
                end += size
            assert end <= lanes.segment_length
        if expected[1] < lanes.positions[begun[1]]:
            begun[2] = lanes.state()["guests"][lane]
    return [each for _, host, guests in sorted(found) for each in (host, *guests)]


def test_every_token_is_trained_on_once_an_epoch_whatever_the_layout():
    random = np.random.default_rng(0)
    for seed in range(3000):
        corpus = random_corpus(random)
        lanes, plans, count = lanes_of(corpus, seed), [], len(corpus[0])
        while lanes.epoch < 2:
            plans.append(lanes.next_plan())
        read = sum(plan.num_tokens for plan in plans)
        assert lanes.epoch == read / lanes.positions.sum()
        taken = documents_taken(lanes, plans)
        for epoch in range(2):
            own = taken[epoch * count : (epoch + 1) * count]
            assert sorted(own) == list(range(count))


def test_a_document_of_a_million_tokens_is_read_whole_among_short_ones():
    lengths = np.r_[1_000_001, RANDOM.integers(2, 600, 3000)]
    lanes = lanes_of((lengths, 512, 64, 4))
    plans = [lanes.next_plan() for _ in range(62)]  # twice as long as the lane of the long one
    taken = documents_taken(lanes, plans)
    assert sorted(taken[:3001]) == list(range(3001))
    tokens = Counter()
    for document, _, length, _, guests in chain(*segments_of(plans)):
        tokens[document] += length
        tokens.update({guest: size for _, guest, size in guests})
    assert tokens[0] >= 1_000_000


@pytest.mark.parametrize("packed", [False, True], ids=["alone", "packed"])
def test_lanes_take_units_slot_by_slot(corpus, packed):
    lengths, n, window, batch = corpus
    positions = (lengths - 1).tolist()

    def units():
        documents = DocumentQueue(len(lengths), 3)
        queue = PackedQueue(documents, lengths - 1, n)
        while True:
            host = int((queue if packed else documents).rest()[0])
            yield host, queue.units.guests_of(queue.taken) if packed else None
            (queue if packed else documents).advance(np.array([host]))

    lanes = lanes_of(corpus, packing=packed)
    plans = [lanes.next_plan() for _ in range(40)]
    expected = expected_segments(units(), positions, n, batch, 40 * window)
    assert segments_of(plans) == expected


def test_the_packed_order_is_that_of_other_machines(monkeypatch):
    # A run resumed elsewhere must go on in the same order: these numbers must never change.
    monkeypatch.setattr(packing, "BLOCK", 2048)
    lanes = Lanes(np.array([4, 3, 9, 20, 6, 2, 7, 9, 2, 14]), N, 9, 1, seed=7, packing=True)
    plan = lanes.next_plan()
    assert plan.documents.tolist() == [[8, 3, 3, 3, 6, 2, 9, 9, 7]]
    assert plan.guests.segments.tolist() == [0, 3, 4, 7]
    assert plan.guests.documents.tolist() == [5, 4, 1, 0]


def test_seek_equals_stepping(corpus):
    stepped, sought = lanes_of(corpus), lanes_of(corpus)
    for step in range(60):
        sought.seek(step)
        assert sought.state() == stepped.state()
        assert sought.epoch == stepped.epoch
        assert segments_of([sought.next_plan()]) == segments_of([stepped.next_plan()])


def test_seek_equals_stepping_in_random_corpora():
    random = np.random.default_rng(1)
    for seed in range(100):
        corpus = random_corpus(random)
        stepped, sought = lanes_of(corpus, seed), lanes_of(corpus, seed)
        steps = int(random.integers(1, 30))
        for _ in range(steps):
            stepped.next_plan()
        sought.seek(steps)
        assert sought.state() == stepped.state()


@pytest.mark.parametrize("shares", SHARES.values(), ids=list(SHARES))
def test_load_state_at_every_step_goes_on_equally(shares):
    corpus = CORPORA["mixed"]
    lanes = lanes_of(corpus, shares=shares)
    states, plans, epochs = [], [], []
    for _ in range(60):
        states.append(json.loads(json.dumps(lanes.state())))
        epochs.append((lanes.epoch, lanes.corpus_epochs))
        plans.append(lanes.next_plan())
    for step in range(57):
        resumed = lanes_of(corpus, shares=shares)
        resumed.next_plan()
        resumed.load_state(states[step])
        assert resumed.state() == states[step]
        assert (resumed.epoch, resumed.corpus_epochs) == epochs[step]
        found = [resumed.next_plan() for _ in range(3)]
        assert segments_of(found) == segments_of(plans[step : step + 3])


def test_a_state_stays_as_it_was_taken():
    lanes = lanes_of(CORPORA["short"])
    for _ in range(20):
        state = lanes.state()
        text = json.dumps(state)
        lanes.next_plan()
        assert json.dumps(state) == text


def test_a_mixture_follows_its_weights_and_counts_its_epochs():
    corpus, shares = CORPORA["mixed"], SHARES["mixture"]
    lanes, plans = lanes_of(corpus, shares=shares), []
    while lanes.epoch < 20:
        plans.append(lanes.next_plan())
    tokens = np.zeros(2)
    for document, _, length, _, guests in chain(*segments_of(plans)):
        tokens[int(document >= 25)] += length
        for _, guest, size in guests:
            tokens[int(guest >= 25)] += size
    assert tokens[1] / tokens[0] == pytest.approx(3, rel=0.05)
    sizes = [lanes.positions[:25].sum(), lanes.positions[25:].sum()]
    assert lanes.corpus_epochs == pytest.approx(tokens / sizes, rel=0.05)


def test_a_state_without_a_word_about_packing_goes_on_without(corpus):
    before, after = lanes_of(corpus, packing=False), lanes_of(corpus)
    before.next_plan()
    state = before.state()
    assert "packing" not in state
    after.load_state(state)
    assert not after.packing
    assert after.state() == state
    for _ in range(20):
        plan = after.next_plan()
        assert plan.guests is None
        assert segments_of([plan]) == segments_of([before.next_plan()])
    assert after.epoch == before.epoch


def test_a_packed_run_cannot_go_on_unpacked():
    state = lanes_of(CORPORA["mixed"]).state()
    with pytest.raises(UserError, match=r"^data\.packing \(False\) must be True, as when the run"):
        lanes_of(CORPORA["mixed"], packing=False).load_state(state)


def test_lanes_refuse_a_corpus_whose_tokens_do_not_fill_a_step():
    corpus = np.full(32, 3), N, 4, 4  # 64 tokens fill 8 segments, or take 32 unpacked
    with pytest.raises(UserError, match=r" = 16 segments a step, but .* only 8 segments .* packed"):
        lanes_of(corpus)
    lanes_of(corpus, packing=False)
    lanes_of((np.full(32, 3), N, 2, 4))


def test_lanes_fill_their_segments(monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 2048)
    lengths = lengths_like(500, 1000, 20_000)
    lanes = Lanes(lengths, 2048, 16, 8, 0, packing=True)
    steps = 75
    read = sum(lanes.next_plan().num_tokens for _ in range(steps))
    share = read / (steps * 8 * 16 * 2048)
    assert share >= 0.97
    assert share == pytest.approx(useful_share(lengths, 2048, True), abs=0.002)


def test_seek_over_a_million_documents_is_fast(monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 2048)
    lengths = lengths_like(500, 1000, 1_000_000)
    lanes = Lanes(lengths, 2048, 16, 1024, 1, packing=True)
    began = time.process_time()
    lanes.seek(lanes.positions.sum() // (2048 * 1024 * 16))
    assert time.process_time() - began < 5  # about 0.65 s on an idle core
    assert 0.95 < lanes.epoch <= 1
