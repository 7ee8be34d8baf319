import json

import numpy as np
import pytest

from infini_ds.data import packing
from infini_ds.data.document_queue import DocumentQueue
from infini_ds.data.mixed_queue import MixedQueue
from infini_ds.data.packing import PackedQueue, open_queue, pack, useful_share
from tests.data.packed_plans import lengths_like


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 16)


def plain_pack(sizes, n):
    """Best fit, the longest first: the host and the guests of each unit."""
    rooms = {d: -size % n for d, size in enumerate(sizes) if size > n}
    guests = {d: [] for d in rooms}
    short = [d for d, size in enumerate(sizes) if size <= n]
    for document in sorted(short, key=lambda d: -sizes[d]):
        size = sizes[document]
        fitting = [(room, host) for host, room in rooms.items() if room >= size]
        if fitting:
            room, host = min(fitting)
            guests[host].append(document)
            rooms[host] = room - size
        else:
            rooms[document], guests[document] = n - size, []
    return sorted(guests.items())


def units_of(packed):
    return [(host, packed.guests_of(unit)) for unit, host in enumerate(packed.hosts.tolist())]


def test_pack_is_best_fit_with_the_longest_first():
    random = np.random.default_rng(0)
    for _ in range(1000):
        n = int(random.choice([1, 2, 5, 8, 30]))
        sizes = random.integers(1, 2 * n + 2, random.integers(1, 40))
        assert units_of(pack(sizes, n)) == plain_pack(sizes.tolist(), n)


def test_pack_fills_the_tail_of_a_long_document_and_a_segment_of_short_ones():
    found = pack(np.array([5, 2, 9, 1, 8, 3]), 8)
    assert units_of(found) == [(2, [0, 1]), (4, []), (5, [3])]


def test_pack_leaves_documents_alone_that_nothing_fits_behind():
    assert units_of(pack(np.array([8, 16, 8]), 8)) == [(0, []), (1, []), (2, [])]
    assert units_of(pack(np.array([9]), 8)) == [(0, [])]


@pytest.mark.parametrize(
    ("median", "mean", "times"), [(500, 1000, 2.2), (800, 3000, 1.4)], ids=["web", "code"]
)
def test_packed_segments_are_nearly_full(median, mean, times):
    lengths = lengths_like(median, mean, 100_000)
    alone, packed = (useful_share(lengths, 2048, packing) for packing in (False, True))
    assert packed >= 0.97
    assert packed >= times * alone


def test_useful_share_of_few_documents():
    lengths = np.array([9, 5, 3, 17])  # 8, 4, 2 and 16 tokens to train on
    assert useful_share(lengths, 8, False) == 30 / 40
    assert useful_share(lengths, 8, True) == 30 / 32


def test_useful_share_of_a_mixture_follows_its_weights():
    lengths = np.r_[np.full(1000, 9), np.full(1000, 3)]  # full segments, and a quarter of one
    share = useful_share(lengths, 8, False, [(1000, 3.0), (1000, 1.0)])
    assert share == pytest.approx(1 / (3 / 4 + 1 / 4 * 4), rel=0.01)
    assert useful_share(lengths, 8, True, [(1000, 3.0), (1000, 1.0)]) > 0.99


def packed_queue(sizes, shares=(), n=10, seed=3):
    return PackedQueue(open_queue(sizes, seed, shares), sizes, n)


def take_units(queue, count):
    taken = []
    while len(taken) < count:
        host = queue.rest()[:1]
        taken.append((int(host[0]), queue.units.guests_of(queue.taken)))
        queue.advance(host)
    return taken


def flat(units):
    return [document for host, guests in units for document in (host, *guests)]


SIZES = np.random.default_rng(1).integers(1, 25, 100)


def test_blocks_end_with_the_epoch(small_blocks):
    taken = flat(take_units(packed_queue(SIZES), 300))
    for epoch in range(3):
        assert sorted(taken[100 * epoch : 100 * (epoch + 1)]) == list(range(100))


def test_no_document_moves_further_than_a_block(small_blocks):
    taken = flat(take_units(packed_queue(SIZES), 300))[:300]
    order = DocumentQueue(100, 3).take(300).tolist()
    for epoch in range(0, 300, 100):
        for first in range(epoch, epoch + 100, 16):
            end = min(first + 16, epoch + 100)
            assert sorted(taken[first:end]) == sorted(order[first:end])
    places = {document: place for place, document in enumerate(order[:100])}
    hosts = [host for host, _ in take_units(packed_queue(SIZES), 20)]
    assert [places[host] for host in hosts] == sorted(places[host] for host in hosts)


def test_tokens_are_those_of_hosts_and_guests(small_blocks):
    queue = packed_queue(SIZES)
    queue.advance(queue.rest()[:2])
    assert queue.tokens(0) == 0
    expected = SIZES[flat(take_units(queue, 3))].sum()
    other = packed_queue(SIZES)
    other.advance(other.rest()[:2])
    assert other.tokens(3) == expected


SHARES = [(60, 1.0), (40, 3.0)]


@pytest.mark.parametrize("shares", [(), SHARES], ids=["one_corpus", "mixture"])
def test_load_state_goes_on_in_the_middle_of_a_block(small_blocks, shares):
    whole = take_units(packed_queue(SIZES, shares), 120)
    queue = packed_queue(SIZES, shares)
    for taken in range(120):
        other = packed_queue(SIZES, shares)
        other.rest()
        other.load_state(json.loads(json.dumps(queue.state())))
        assert other.state() == queue.state()
        assert take_units(other, min(20, 120 - taken)) == whole[taken : taken + 20]
        assert take_units(queue, 1) == whole[taken : taken + 1]


def test_a_mixture_is_packed_in_its_own_order(small_blocks):
    mixed = MixedQueue([SIZES[:60], SIZES[60:]], [1.0, 3.0], 3).take(160).tolist()
    taken = flat(take_units(packed_queue(SIZES, SHARES), 160))
    for first in range(0, 160, 16):  # a block may hold a document twice
        assert sorted(taken[first : first + 16]) == sorted(mixed[first : first + 16])


def test_epochs_of_a_mixture_count_what_was_taken(small_blocks):
    queue = packed_queue(SIZES, SHARES)
    counts = np.zeros(2)
    assert queue.epochs == [0, 0]
    for _ in range(100):
        for document in flat(take_units(queue, 1)):
            counts[int(document >= 60)] += 1
        assert queue.epochs == pytest.approx(counts / [60, 40])
    assert packed_queue(SIZES).epochs == []


def test_new_weights_apply_after_the_block_that_was_begun(small_blocks):
    before = packed_queue(SIZES, SHARES)
    take_units(before, 30)
    left = len(before.rest())
    assert left > 1
    changed = [(60, 4.0), (40, 1.0)]
    after, again = packed_queue(SIZES, changed), packed_queue(SIZES, changed)
    after.load_state(before.state())
    take_units(after, 1)
    again.load_state(json.loads(json.dumps(after.state())))
    whole = take_units(before, left)
    # Where the block ends, the corpora stay where they are, and their clocks restart.
    mixed = MixedQueue([SIZES[:60], SIZES[60:]], [4.0, 1.0], 3)
    before.rest()
    mixed.load_state(before.state()["block"])
    whole += take_units(PackedQueue(mixed, SIZES, 10), 80)
    assert take_units(after, left + 79) == whole[1:]
    assert take_units(again, left + 79) == whole[1:]
