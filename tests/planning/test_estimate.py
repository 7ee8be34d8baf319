"""What a run is estimated to need, beside the models and layouts themselves."""

import pytest
import torch

from infini_ds.config import RunConfig
from infini_ds.model.block import Block
from infini_ds.model.layers import layer_list
from infini_ds.parallel.weights_on_disk import buffers
from infini_ds.planning.estimate import checkpoint_bytes, layer_parameters, process_bytes
from tests import tiny

OPTIONS = [
    {},
    {"tie_embeddings": True, "num_kv_heads": 2},
    {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True, "head_bias": True},
    {
        "memory": {"write_gate": True, "write_gate_sees_keys": True, "short_conv": True},
        "num_kv_heads": 1,
    },
    {"memory": {"write_gate": True, "write_gate_sees_keys": True, "layers": [1]}},
    {"intermediate_size": 77, "memory_rule": "delta", "qk_norm": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "default")
def test_parameters_are_those_of_the_modules(options):
    config = tiny.model_config(
        vocab_size=301, hidden_size=24, num_layers=3, num_heads=4, head_dim=10, **options
    )
    with torch.device("meta"):
        layers = [layer.module(*layer.args) for layer in layer_list(config)]
    counts = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    assert layer_parameters(config) == counts


def run_config(**settings) -> RunConfig:
    """Four blocks, with segments so long that the head does not count in balancing the stages."""
    return tiny.run_config(
        model={
            "vocab_size": 300, "num_layers": 4, "num_heads": 2, "head_dim": 8,
            "segment_length": 2048,
        },
        train={"batch_size": 8, "dtype": "fp32"},
        **settings,
    )  # fmt: skip


MEMORY = 4 * 2 * (8 * 8 + 8)  # of a lane in a layer


def test_all_stages_together_have_the_model_and_its_memories_once():
    config = run_config(parallel__memory_transport="resident")
    parameters = sum(layer_parameters(config.model))
    for world in (1, 2, 4):
        needs = process_bytes(config, world)
        assert len(needs) == world
        assert sum(device for device, _ in needs) == 20 * parameters + 8 * 4 * MEMORY


def test_optimizer_states_are_shared_out_and_may_be_in_the_hosts_memory():
    config = run_config(parallel__pipeline_stages=1)
    parameters = sum(layer_parameters(config.model))
    memories = 8 // 4 * 4 * MEMORY
    assert process_bytes(config, 4) == [((8 + 12 // 4) * parameters + memories, 0)] * 4
    offloaded = run_config(parallel__pipeline_stages=1, parallel__offload_optimizer=True)
    assert process_bytes(offloaded, 4) == [(8 * parameters + memories, 20 * parameters // 4)] * 4


def test_all_but_memories_may_be_in_the_hosts_memory():
    parameters = sum(layer_parameters(run_config().model))
    memories = 8 // 4 * 4 * MEMORY
    of_zero = {(2, False): (4, 6), (3, False): (1, 5), (3, True): (0, 6)}
    for (zero, weights_too), (device, host) in of_zero.items():
        config = run_config(
            parallel__zero_stage=zero, parallel__offload_optimizer=True,
            parallel__offload_weights=weights_too,
        )  # fmt: skip
        expected = (device * parameters + memories, host * parameters)
        assert process_bytes(config, 4) == [expected] * 4, (zero, weights_too)


def test_weights_on_a_disk_take_buffers_in_the_hosts_memory():
    offloaded = {"zero_stage": 3, "offload_optimizer": True, "offload_weights": True}
    config = run_config(parallel=offloaded)
    ((_, host), *_) = process_bytes(config, 4)
    ((_, buffered), *_) = process_bytes(run_config(parallel={**offloaded, "nvme_path": "/x"}), 4)
    room = buffers(config.model, 4)
    weights = sum(layer_parameters(config.model))
    assert host - weights == buffered - 4 * (room.count + 1) * room.numel


def test_zero_2_shares_out_gradients_and_zero_3_weights_too():
    parameters = sum(layer_parameters(run_config().model))
    memories = 8 // 4 * 4 * MEMORY
    for dtype, weight in (("fp32", 4), ("bf16", 2)):
        for stage, expected in ((2, weight + (4 + 12) / 4), (3, (weight + 4 + 12) / 4)):
            config = run_config(parallel__zero_stage=stage, train__dtype=dtype)
            (device, host), *others = process_bytes(config, 4)
            assert (device - memories) / parameters == pytest.approx(expected, rel=1e-3)
            assert host == 0
            assert others == [(device, 0)] * 3


def test_what_is_not_trained_has_neither_gradients_nor_states():
    config = run_config(parallel__pipeline_stages=2, optimizer__train=["*.beta", "layers.4.*"])
    counts = layer_parameters(config.model)
    trained = [2 * 2, 2 + counts[4]]  # two gates in each of three blocks
    own = [counts[0] + counts[1] + counts[2], sum(counts[3:])]
    kept = [8 * 4 * MEMORY, 0]
    for stage, (device, _) in enumerate(process_bytes(config, 2)):
        assert device == 4 * own[stage] + (4 + 12) * trained[stage] + kept[stage]
    assert checkpoint_bytes(config) == 4 * sum(counts) + 12 * sum(trained) + 8 * 4 * MEMORY


def test_carried_memories_are_on_the_first_stage():
    resident, carried = (
        process_bytes(run_config(parallel__memory_transport=transport), 2)
        for transport in ("resident", "carried")
    )
    difference = [one - other for (one, _), (other, _) in zip(carried, resident, strict=True)]
    assert difference == [8 * 2 * MEMORY, -8 * 2 * MEMORY]


def test_ranks_are_in_the_order_of_stages():
    needs = process_bytes(run_config(parallel__pipeline_stages=2), 4)
    assert needs[0] == needs[1] != needs[2] == needs[3]


@pytest.mark.parametrize(
    ("dtype", "zero_stage", "bytes_each"), [("bf16", 1, 14), ("fp32", 1, 16), ("fp32", 0, 12)]
)
def test_checkpoint_has_weights_states_and_memories(dtype, zero_stage, bytes_each):
    config = run_config(train__dtype=dtype, parallel__zero_stage=zero_stage)
    parameters = sum(layer_parameters(config.model))
    assert checkpoint_bytes(config) == bytes_each * parameters + 8 * 4 * MEMORY


@pytest.mark.parametrize(("world", "zero_stage", "shards"), [(1, 1, 1), (4, 1, 2), (4, 0, 1)])
def test_muon_keeps_one_moment_of_projections(world, zero_stage, shards):
    layout = {"parallel__zero_stage": zero_stage}
    if world > 1:
        layout["parallel__pipeline_stages"] = 2
    adamw, muon = (run_config(**layout, optimizer__name=name) for name in ("adamw", "muon"))
    with torch.device("meta"):
        block = Block(muon.model)
    numbers = sum(p.numel() for n, p in block.named_parameters() if n.endswith("_proj.weight"))
    assert checkpoint_bytes(adamw) - checkpoint_bytes(muon) == 4 * 4 * numbers
    blocks = 4 if world == 1 else 2
    for (more, _), (less, _) in zip(
        process_bytes(adamw, world), process_bytes(muon, world), strict=True
    ):
        assert more - less == 4 * blocks * numbers // shards
