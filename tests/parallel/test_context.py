from pathlib import Path

import pytest

from infini_ds.parallel.part import Part
from tests import tiny
from tests.parallel.conftest import LIMIT

WORKER = Path(__file__).with_name("context_worker.py")
RANKS = 3


def test_ranks_gather_in_their_order_and_sum_up_what_is_theirs(outcome_of_ranks):
    seen = outcome_of_ranks("orderly")
    assert seen["gathered"] == [[10 * place + x for x in range(4)] for place in range(3)]
    assert seen["summed"] == [x * (1 + 2 + 3) for x in range(4)]
    assert seen["bytes"] == 2 * 2 * 4 * 4  # forward and back, to two ranks, four numbers


@pytest.mark.parametrize("peers", ["silent", "dead"])
def test_exchange_gives_up_within_the_limit_and_names_what_and_whom(outcome_of_ranks, peers):
    seen = outcome_of_ranks(peers)
    assert seen["error"].startswith("waited for memories of ranks 1, 2")
    assert "train.timeout = 2 s" in seen["error"]
    assert "\n" not in seen["error"]
    assert seen["waited"] < LIMIT + 3


def part(replica: int, context: int) -> Part:
    return Part(0, replica, 3, 2, (0, 2, 5), context)


@pytest.mark.parametrize("context", [1, 2, 4])
def test_ranks_share_lanes_and_together_read_all_of_them(context):
    parts = [part(replica, context) for replica in range(4)]
    for first in range(0, 4, context):
        group = parts[first : first + context]
        assert {each.lanes for each in group} == {group[0].lanes}
        assert [each.place for each in group] == list(range(context))
    lanes = [lane for each in parts if each.place == 0 for lane in each.lanes]
    assert lanes == list(range(6 * 4 // context))
    assert [lane for micro in range(3) for lane in parts[-1].lanes_of(micro)] == [*parts[-1].lanes]


@pytest.mark.parametrize(
    ("rule", "matrices", "divides"),
    [("linear", 1, True), ("delta", 2, True), ("gated_delta", 2, False)],
)
def test_bytes_of_an_exchange_do_not_depend_on_tokens(rule, matrices, divides):
    for n in (8, 64):
        model = tiny.model_config(memory_rule=rule, segment_length=n)
        # Two heads of 8: of M, and where reads are divided by z, of z and a flag.
        numbers = matrices * 2 * 8 * 8 + (2 * 8 + 1 if divides else 0)
        assert part(0, 4).exchange_bytes(model) == 3 * 2 * numbers * 4
        assert part(0, 1).exchange_bytes(model) == 0
        layers = 3 * 5 * 2  # micro-batches, chunks, blocks
        assert part(0, 4).step_exchange_bytes(model, chunks=5) == 2 * layers * 3 * 2 * numbers * 4
