"""What a block keeps, beside a block that really runs."""

import pytest
import torch

from infini_ds.config import ModelConfig
from infini_ds.memory.hand_on import Exchange
from infini_ds.model.block import Block
from infini_ds.model.layer_state import empty_state
from infini_ds.model.transformer import full_layout
from infini_ds.planning.activations import Unit, block_bytes
from tests import tiny

OPTIONS = {
    "plain": {},
    "all": {
        "num_kv_heads": 1, "memory_rule": "delta", "qk_norm": True, "attention_bias": True,
        "memory": {"write_gate": True, "write_gate_sees_keys": True, "short_conv": True},
    },
    "sliding window": {"num_kv_heads": 1, "use_sliding_window": True},
    "no memory": {"memory": {"write_gate": True, "short_conv": True, "layers": []}},
}  # fmt: skip


def model_of(**options) -> ModelConfig:
    sizes = {"hidden_size": 96, "num_heads": 2, "head_dim": 40, "segment_length": 48}
    return tiny.model_config(**(sizes | options))


class Echo(Exchange):
    """The last of several ranks that share a window and tell each other the same."""

    def __init__(self, count):
        self.place, self.count = count - 1, count
        self.heard = []

    def all_gather(self, own):
        self.heard.append(torch.stack([own] * self.count))
        return lambda: self.heard[-1]

    def sum_of_own(self, by_place):
        return lambda: by_place[0]


def really_kept(model, unit, checkpointing) -> int:
    batch, segments, dtype, ranks = unit
    block = Block(model, checkpointing).to(dtype)
    length = segments * model.segment_length
    hidden = torch.randn(batch, length, model.hidden_size, dtype=dtype, requires_grad=True)
    layout = full_layout(batch, segments, model.segment_length, hidden.device)
    memory = empty_state(model, batch)
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    exchange = Echo(ranks) if ranks > 1 else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        block(hidden, layout, memory, exchange)
    heard = [] if exchange is None or checkpointing == "none" else exchange.heard
    for x in (hidden, *memory, *heard):
        keep(x)
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    return sum(storage.nbytes() for at, storage in kept.items() if at not in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "attention", "block"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_kept_is_what_a_running_block_keeps(options, checkpointing, dtype):
    model = model_of(**options)
    for unit in (Unit(1, 2, dtype), Unit(2, 5, dtype)):
        really = really_kept(model, unit, checkpointing)
        assert block_bytes(model, unit, checkpointing) == pytest.approx(really, rel=0.03)
    if checkpointing != "none":
        assert block_bytes(model, unit, checkpointing) == really


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("checkpointing", ["none", "attention", "block"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_kept_is_what_a_block_keeps_on_ranks_that_share_a_window(options, checkpointing, ranks):
    # By batch 1, the memory of a single head is broadcast to segments without a copy.
    model = model_of(**options | {"num_kv_heads": 2})
    for unit in (Unit(1, 2, torch.float32, ranks), Unit(2, 5, torch.float32, ranks)):
        alone = unit._replace(ranks=1)
        really = [really_kept(model, each, checkpointing) for each in (unit, alone)]
        kept = [block_bytes(model, each, checkpointing) for each in (unit, alone)]
        assert kept[0] == pytest.approx(really[0], rel=0.03)
        assert kept[0] - kept[1] == pytest.approx(really[0] - really[1], rel=0.1)


def test_where_the_kernels_fit_less_is_kept():
    """Inputs of both halves, their norms, q, k, v, attention's output, gate and up; the memories
    that segments read; and a few numbers a token."""
    model = model_of(head_dim=64, segment_length=128)
    unit = Unit(1, 4, torch.bfloat16)
    kept = block_bytes(model, unit, "none")
    tokens, inner = 4 * 128, 2 * 64
    width = 2 * 96 + 2 * 96 + 3 * inner + inner + 2 * model.mlp_size
    states = 4 * 4 * 2 * 64 * 65
    assert kept == pytest.approx(tokens * 2 * width + states, rel=0.05)
    assert kept < really_kept(model, unit, "none")
