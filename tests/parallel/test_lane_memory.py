from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from infini_ds.memory import RULES, MemoryState
from infini_ds.model.layer_state import empty_state
from infini_ds.parallel.lane_memory import LaneMemory, write_memories
from infini_ds.parallel.part import Part
from tests import tiny

CONFIG = tiny.model_config(num_layers=4, num_heads=2, head_dim=4)
LANES = 2


def held(micro_batches=3) -> LaneMemory:
    return LaneMemory(CONFIG, micro_batches, LANES, range(1, 3), torch.device("cpu"))


def memory(lanes: int) -> MemoryState:
    return MemoryState(torch.randn(lanes, 2, 4, 4), torch.rand(lanes, 2, 4))


def test_lanes_begin_with_nothing_read():
    for block in (1, 2):
        stacked = held().stacked(block)
        assert stacked.kv.shape == (6, 2, 4, 4)
        assert stacked.kv.dtype == torch.float32
        assert not stacked.kv.any()
        assert not stacked.norm.any()


def test_put_keeps_the_held_blocks_of_a_micro_batch_alone():
    lanes = held()
    window = {block: memory(LANES) for block in range(4)}
    lanes.put(1, window)
    assert set(lanes.get(1)) == {1, 2}
    for block in (1, 2):
        assert torch.equal(lanes.get(1)[block].kv, window[block].kv)
        assert not lanes.get(0)[block].kv.any()


def test_put_cuts_the_gradient():
    lanes = held()
    window = {b: MemoryState(*(t.requires_grad_() * 1 for t in memory(LANES))) for b in (1, 2)}
    lanes.put(0, window)
    assert not any(tensor.requires_grad for tensor in lanes.get(0)[1])


def test_get_gives_a_dict_that_may_be_changed():
    lanes = held()
    lanes.get(0).clear()
    assert set(lanes.get(0)) == {1, 2}


def test_load_is_the_inverse_of_stacked():
    lanes, wanted = held(), memory(6)
    lanes.load(2, wanted)
    for part, expected in zip(lanes.stacked(2), wanted, strict=True):
        assert torch.equal(part, expected)
    for micro_batch in range(3):
        rows = slice(LANES * micro_batch, LANES * (micro_batch + 1))
        assert torch.equal(lanes.get(micro_batch)[2].norm, wanted.norm[rows])
    assert not lanes.stacked(1).kv.any()


def test_load_keeps_no_view_of_what_was_loaded():
    lanes, wanted = held(), memory(6)
    lanes.load(1, wanted)
    wanted.kv.zero_()
    assert lanes.stacked(1).kv.any()


def test_load_refuses_another_number_of_lanes():
    with pytest.raises(ValueError, match="argument"):
        held().load(1, memory(1))


def test_clear_empties_the_marked_lanes_of_a_micro_batch():
    lanes, before = held(), memory(6)
    lanes.load(2, before)
    lanes.clear(1, torch.tensor([False, True]))
    for part, expected in zip(lanes.stacked(2), before, strict=True):
        assert not part[3].any()
        kept = [0, 1, 2, 4, 5]
        assert torch.equal(part[kept], expected[kept])


@pytest.mark.parametrize("taps", [0, 3])
@pytest.mark.parametrize("rule", RULES)
def test_lanes_are_read_from_the_files_of_other_ranks(tmp_path, rule, taps):
    config = tiny.model_config(
        num_layers=1, num_heads=2, head_dim=4, memory_rule=rule, memory={"short_conv": taps}
    )

    def lanes_of_a_rank(micro_batches: int) -> LaneMemory:
        return LaneMemory(config, micro_batches, LANES, range(1), torch.device("cpu"))

    whole = empty_state(config, 8).map(torch.rand_like)
    for rank, part in enumerate(whole.chunk(2)):
        saving = lanes_of_a_rank(2)
        saving.load(0, part)
        files = saving.files(Path(tmp_path), Part(0, rank, 2, 2, (0, 1)))
        assert write_memories(files) == list(map(str, files))
    reading = lanes_of_a_rank(2)
    reading.read(Path(tmp_path), range(2, 6))
    for part, expected in zip(reading.stacked(0), whole, strict=True):
        assert torch.equal(part, expected[2:6])


def test_files_of_earlier_versions_have_no_tail(tmp_path):
    config = tiny.model_config(num_layers=1, memory={"short_conv": 4})
    saving = LaneMemory(config, 1, 2, range(1), torch.device("cpu"))
    stored = empty_state(config, 2).map(torch.rand_like)
    save_file(
        {"kv": stored.kv, "norm": stored.norm}, tmp_path / "block_000.lanes_00000.safetensors"
    )
    saving.load(0, stored)
    saving.read(tmp_path, range(2))
    read = saving.stacked(0)
    assert torch.equal(read.kv, stored.kv)
    assert read.tail is not None
    assert not read.tail.any()


@pytest.mark.parametrize("taps", [0, 3])
def test_what_is_not_finite_is_cleared_by_heads_and_the_tail_by_lanes(taps):
    config = tiny.model_config(
        num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4, memory={"short_conv": taps}
    )
    lanes = LaneMemory(config, 1, 3, range(1), torch.device("cpu"))
    stored = empty_state(config, 3).map(torch.rand_like)
    stored.kv[0, 1, 2, 3] = torch.nan
    stored.norm[1, 0, 2] = torch.inf
    if stored.tail is not None:
        stored.tail[2, 1, 0, 3] = -torch.inf
    lanes.load(0, stored)
    lanes.clear_broken()
    found = lanes.stacked(0)
    broken = torch.tensor([[False, True], [True, False], [False, False]])
    for part, before in ((found.kv, stored.kv), (found.norm, stored.norm)):
        assert not part[broken].any()
        assert torch.equal(part[~broken], before[~broken])
    if found.tail is not None:
        assert stored.tail is not None
        assert not found.tail[2].any()
        assert torch.equal(found.tail[:2], stored.tail[:2])
