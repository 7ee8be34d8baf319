from types import SimpleNamespace
from typing import Any

import pytest
import torch

from infini_ds.layout import Layout
from infini_ds.parallel.part import Part
from infini_ds.parallel.pipeline.hand_over import HandOver
from infini_ds.parallel.pipeline.payload import Payload
from infini_ds.parallel.pipeline.transport import TRANSPORTS
from tests.parallel.test_payload import payload, wire


class Hop:
    """Keeps what one stage sends until the other receives it."""

    def __init__(self):
        self.messages = []

    def send(self, message):
        self.messages.append(message)

    def receive(self, size):
        assert len(self.messages[0]) == size
        return self.messages.pop(0)


@pytest.fixture(params=["carried", "resident"])
def ends(request):
    """The sending and the receiving stage of packed training, with five blocks."""
    made, hop = wire("several_lanes", torch.float32, packed=True), Hop()
    policy = TRANSPORTS[request.param]((0, 2, 5))
    hops: Any = SimpleNamespace(to_next=hop, from_previous=hop)
    parts = [Part(stage, 0, 1, made.batch, (0, 2, 5)) for stage in (0, 1)]
    return made, [HandOver(policy, made, hops, part, chunks=1) for part in parts]


def test_training_hands_over_where_packed_documents_begin(ends):
    made, (sender, receiver) = ends
    sent = payload(made, range(5))
    sender.send(sent, 0, training=True)
    received = receiver.receive(0, training=True).layout
    assert all(torch.equal(a, b) for a, b in zip(received, sent.layout, strict=True))


def test_evaluation_hands_over_layouts_that_are_not_packed(ends):
    made, (sender, receiver) = ends
    hidden, layout, memories = payload(made, range(5))
    sent = Payload(hidden, Layout(*layout[:2]), memories)
    sender.send(sent, 0, training=False)
    received = receiver.receive(0, training=False).layout
    assert received.begins is None
    assert torch.equal(received.lengths, layout.lengths)
