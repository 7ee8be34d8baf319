from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from infini_ds.parallel.pipeline.channel import Channel
from tests.parallel.conftest import LIMIT

WORKER = Path(__file__).with_name("channel_worker.py")
RANKS = 2


def test_receive_gives_messages_of_any_size_in_the_order_they_were_sent(outcome_of_ranks):
    seen = outcome_of_ranks("orderly")
    assert seen["same"] == [True] * 6
    assert seen["seconds"] > 0


@pytest.mark.parametrize("peer", ["silent", "dead"])
def test_receive_gives_up_within_the_limit_and_names_what_and_whom(outcome_of_ranks, peer):
    seen = outcome_of_ranks(peer)
    assert seen["error"].startswith("waited for gradients of stage 1 of rank 1")
    assert "train.timeout = 2 s" in seen["error"]
    assert "\n" not in seen["error"]
    assert seen["waited"] < LIMIT + 3
    if peer == "silent":
        assert seen["waited"] > LIMIT - 0.5


def test_errors_of_the_device_are_not_told_as_those_of_another_rank(monkeypatch):
    def run_out(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dist, "isend", run_out)
    channel = Channel("activations of stage 1", 1, None, 1.0)  # type: ignore[arg-type]
    with pytest.raises(torch.OutOfMemoryError):
        channel.send(torch.zeros(1, dtype=torch.uint8))
