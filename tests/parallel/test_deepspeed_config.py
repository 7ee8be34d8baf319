"""DeepSpeed takes any key in silence: each of ours must be one that it reads."""

import copy
import inspect
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import engine as pipe_engine
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from infini_ds.config import RunConfig
from infini_ds.parallel.deepspeed.config import deepspeed_config
from infini_ds.parallel.weights_on_disk import buffers, folder_of
from tests import tiny


def run_config(**sections) -> RunConfig:
    return tiny.run_config(
        train__batch_size=12,
        train__micro_batch_size=2,
        train__dtype="bf16",
        parallel__zero_stage=1,
        **sections,
    )


def parsed(tree: dict) -> dict:
    """Everything that DeepSpeed has understood of a dict."""
    config = DeepSpeedConfig(copy.deepcopy(tree))
    seen = {}
    for name, value in vars(config).items():
        text = repr(value.model_dump() if hasattr(value, "model_dump") else value)
        if name != "_param_dict" and " object at " not in text:
            seen[name] = text
    return seen


def changed(tree: dict, path: tuple[str, ...], value: Any) -> dict:
    tree = copy.deepcopy(tree)
    node = tree
    for name in path[:-1]:
        node = node.setdefault(name, {})
    node[path[-1]] = value
    return tree


def leaves(tree: dict, path: tuple[str, ...] = ()):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name)


OFFLOADED = {"parallel": {"zero_stage": 3, "offload_optimizer": True, "offload_weights": True}}
BASE = deepspeed_config(run_config(**OFFLOADED), 1, universal=False)
OTHERS = {
    "steps_per_print": 7,
    "gradient_clipping": 0.25,
    "data_types.grad_accum_dtype": "bf16",
    "communication_data_type": "bf16",
    "bf16.enabled": False,
    "zero_optimization.stage": 0,
    "zero_optimization.contiguous_gradients": False,
    "zero_optimization.reduce_bucket_size": 11,
    "zero_optimization.allgather_bucket_size": 11,
    "zero_optimization.offload_optimizer.device": "none",
    "zero_optimization.offload_optimizer.pin_memory": False,
    "zero_optimization.offload_param.device": "none",
    "zero_optimization.offload_param.pin_memory": False,
    "zero_optimization.stage3_param_persistence_threshold": 11,
    "zero_optimization.memory_efficient_linear": True,
    "checkpoint.load_universal": True,
    "zero_allow_untested_optimizer": False,
}
# These three must fit each other, and are read back below.
BATCH = {
    "train_batch_size": 12,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 6,
}
PIPELINE = ("use_reentrant", "activation_checkpoint_interval")


def test_every_key_is_looked_at_below():
    keys = {".".join(path) for path in leaves(BASE)}
    assert keys == {*OTHERS, *BATCH, *(f"pipeline.{name}" for name in PIPELINE)}


@pytest.mark.parametrize("key", OTHERS)
def test_key_changes_what_deepspeed_understands(key):
    assert parsed(changed(BASE, tuple(key.split(".")), OTHERS[key])) != parsed(BASE)


def test_misspelt_key_would_be_noticed():
    assert parsed(changed(BASE, ("gradient_cliping",), 0.25)) == parsed(BASE)


@pytest.mark.parametrize("key", PIPELINE)
def test_pipeline_key_is_read_by_the_engine(key):
    source = inspect.getsource(pipe_engine)
    assert f"pipeline['{key}']" in source or f"pipeline.get('{key}'" in source


@pytest.mark.parametrize("data", [1, 2, 3], ids=lambda n: f"data{n}")
def test_batch_is_divided_over_data_parallel_ranks(data):
    tree = deepspeed_config(run_config(), data, universal=False)
    sizes = {name: tree[name] for name in BATCH}
    assert sizes == {**BATCH, "gradient_accumulation_steps": 6 // data}


@pytest.mark.parametrize(("data", "context"), [(2, 2), (6, 2), (6, 6)])
def test_lanes_that_ranks_share_are_counted_for_each_of_them(data, context):
    """DeepSpeed wants the product of the other two and of the data-parallel size."""
    shared = run_config(parallel={"context_parallel": context}, train__window_segments=context)
    tree = deepspeed_config(shared, data, universal=False)
    accumulation = 6 // (data // context)
    assert tree["gradient_accumulation_steps"] == accumulation
    assert tree["train_batch_size"] == 2 * accumulation * data == 12 * context


def test_batch_is_what_deepspeed_understands():
    config = DeepSpeedConfig(copy.deepcopy(BASE))
    assert {name: getattr(config, name) for name in BATCH} == BATCH


@pytest.mark.parametrize(
    ("sections", "key", "expected"),
    [
        ({"train": {"dtype": "bf16"}}, "bf16.enabled", True),
        ({"train": {"dtype": "fp32"}}, "bf16.enabled", False),
        ({"parallel": {"zero_stage": 0}}, "zero_optimization.stage", 0),
        ({"optimizer": {"gradient_clipping": 0.0}}, "gradient_clipping", 0.0),
        (OFFLOADED, "zero_optimization.offload_optimizer.device", "cpu"),
        (OFFLOADED, "zero_optimization.offload_param.device", "cpu"),
    ],
    ids=str,
)
def test_setting_reaches_its_key(sections, key, expected):
    node = deepspeed_config(run_config(**sections), 1, universal=False)
    for name in key.split("."):
        node = node[name]
    assert node == expected


def test_weights_on_a_disk_are_fetched_a_layer_at_a_time():
    """Their sizes are those of `buffers`; a rank of four has a quarter of each tensor."""
    offloaded = {**OFFLOADED["parallel"], "nvme_path": "/scratch"}
    run = run_config(parallel=offloaded, model__vocab_size=300)
    zero = deepspeed_config(run, 4, universal=False)["zero_optimization"]
    room = buffers(run.model, 4)
    parsed = DeepSpeedZeroConfig(**zero)
    assert parsed.offload_param.device == "nvme"
    assert parsed.offload_param.nvme_path == folder_of(run)
    assert parsed.offload_param.buffer_count == room.count
    assert parsed.offload_param.buffer_size == parsed.sub_group_size == room.numel
    assert parsed.offload_param.max_in_cpu == 0
    assert parsed.prefetch_bucket_size == parsed.max_reuse_distance == 0
    assert parsed.offload_optimizer.device == "cpu"


def test_universal_checkpoint_is_asked_for():
    config = DeepSpeedConfig(deepspeed_config(run_config(), 1, universal=True))
    assert config.load_universal_checkpoint


def test_gradients_are_summed_in_fp32():
    config = DeepSpeedConfig(copy.deepcopy(BASE))
    assert config.grad_accum_dtype == "fp32"
