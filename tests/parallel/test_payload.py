import dataclasses
import itertools
from typing import Any

import pytest
import torch

from infini_ds.config import MemoryConfig
from infini_ds.layout import Layout
from infini_ds.memory import MemoryState
from infini_ds.model.layer_state import empty_state
from infini_ds.parallel.pipeline.payload import Payload, Wire
from tests import tiny

CPU = torch.device("cpu")
# Odd sizes, so that parts do not end where the next may begin.
SHAPES = {
    "odd": {"hidden_size": 3, "segment_length": 5, "head_dim": 2, "batch": 1, "segments": 1},
    "several_lanes": {
        "hidden_size": 10, "segment_length": 7, "head_dim": 6, "batch": 3, "segments": 2,
    },
}  # fmt: skip


def wire(shape, dtype, packed):
    sizes: dict[str, Any] = dict(SHAPES[shape])
    batch, segments = sizes.pop("batch"), sizes.pop("segments")
    config = tiny.model_config(num_layers=5, num_heads=6, num_kv_heads=3, **sizes)
    return Wire(config, batch, segments, dtype, CPU, packed)


def memories(wire, blocks):
    shape = (wire.batch, 3, wire.config.head_dim)
    return {
        block: MemoryState(torch.randn(*shape, shape[-1]), torch.randn(shape)) for block in blocks
    }


def payload(wire, blocks):
    hidden = torch.randn(wire.hidden_shape).to(wire.dtype)
    shape = (wire.batch, wire.segments)
    starts = torch.rand(shape) < 0.5
    n = wire.config.segment_length
    lengths = torch.randint(0, n + 1, shape, dtype=torch.int32)
    begins = torch.randint(0, n + 1, (*shape, n), dtype=torch.int32) if wire.packed else None
    return Payload(hidden, Layout(starts, lengths, begins), memories(wire, blocks))


def up(size):
    return (size + 15) // 16 * 16


KINDS = itertools.product(SHAPES, (torch.float32, torch.bfloat16), (False, True))


@pytest.fixture(params=KINDS, ids=str)
def any_wire(request):
    torch.manual_seed(0)
    return wire(*request.param)


@pytest.mark.parametrize("blocks", [[], [4], [0, 1, 2], [3, 1]], ids=str)
def test_unpack_gives_back_exactly_what_was_packed(any_wire, blocks):
    sent = payload(any_wire, blocks)
    received = any_wire.unpack(any_wire.pack(sent).clone(), blocks)
    assert list(received.memories) == blocks
    for before, after in (
        (sent.hidden, received.hidden),
        *zip(sent.layout[: 2 + any_wire.packed], received.layout, strict=False),
        *(
            pair
            for block in blocks
            for pair in zip(sent.memories[block], received.memories[block], strict=True)
        ),
    ):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)


def test_pack_keeps_values_that_a_conversion_would_lose(any_wire):
    sent = payload(any_wire, [0])
    sent.memories[0].kv.fill_(1 + 2**-20)  # not a bf16 number
    sent.hidden.view(-1)[0] = float("nan")
    received = any_wire.unpack(any_wire.pack(sent), [0])
    assert torch.equal(received.memories[0].kv, sent.memories[0].kv)
    assert received.hidden.view(-1)[0].isnan()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_message_has_the_bytes_of_the_formula(any_wire, count):
    config, batch, segments = any_wire.config, any_wire.batch, any_wire.segments
    length, d = segments * config.segment_length, config.head_dim
    width = 2 if any_wire.dtype == torch.bfloat16 else 4
    hidden = up(batch * length * config.hidden_size * width)
    layout = up(batch * segments * 2 * 4)
    layout += up(batch * length * 4) if any_wire.packed else 0
    kv, norm = count * up(batch * 3 * d * d * 4), count * up(batch * 3 * d * 4)
    message = any_wire.pack(payload(any_wire, range(count)))
    assert message.dtype == torch.uint8
    assert len(message) == any_wire.payload_bytes(range(count)) == hidden + layout + kv + norm
    assert any_wire.gradient_bytes() == hidden
    assert any_wire.memories_bytes(range(count)) == kv + norm


def test_a_layer_without_a_memory_adds_no_bytes(any_wire):
    model = any_wire.config
    some = dataclasses.replace(
        any_wire, config=model.model_copy(update={"memory": MemoryConfig(layers=(1, 3))})
    )
    blocks = list(range(5))
    assert some.memories_bytes(blocks) == any_wire.memories_bytes([1, 3])
    sent = {
        block: empty_state(some.config.of_layer(block), some.batch).map(torch.rand_like)
        for block in blocks
    }
    received = some.unpack_memories(some.pack_memories(sent), blocks)
    for block in blocks:
        for before, after in zip(sent[block], received[block], strict=True):
            assert before.shape == after.shape
            assert torch.equal(before, after)


def test_return_message_is_the_memories_of_all_layers(any_wire):
    blocks = list(range(5))
    sent = memories(any_wire, blocks)
    message = any_wire.pack_memories(sent)
    assert len(message) == any_wire.memories_bytes(blocks)
    received = any_wire.unpack_memories(message, blocks)
    for block in blocks:
        assert torch.equal(received[block].kv, sent[block].kv)
        assert torch.equal(received[block].norm, sent[block].norm)


def test_pack_refuses_a_layout_that_does_not_say_where_packed_documents_begin():
    packed = wire("odd", torch.float32, True)
    sent = payload(packed, [])
    with pytest.raises(ValueError, match="shorter"):
        packed.pack(sent._replace(layout=sent.layout._replace(begins=None)))


def test_pack_refuses_another_dtype_than_the_wire_s(any_wire):
    sent = payload(any_wire, [])
    wrong = torch.float32 if any_wire.dtype == torch.bfloat16 else torch.bfloat16
    with pytest.raises(AssertionError):
        any_wire.pack(sent._replace(hidden=sent.hidden.to(wrong)))


def test_packed_message_carries_no_gradient(any_wire):
    sent = payload(any_wire, [])
    hidden = sent.hidden.requires_grad_()
    assert not any_wire.pack(sent._replace(hidden=hidden * 2)).requires_grad
