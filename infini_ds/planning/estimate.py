"""Computes a run's minimum needs in bytes, without activations and what libraries take."""

import math
from functools import partial
from typing import NamedTuple

from infini_ds.config import ModelConfig, RunConfig
from infini_ds.model.layer_state import state_shapes
from infini_ds.model.optimizer import PROJECTION
from infini_ds.model.trained import trained_counts
from infini_ds.parallel.pipeline.balance import balance
from infini_ds.parallel.pipeline.transport import TRANSPORTS
from infini_ds.parallel.weights_on_disk import buffers


def checkpoint_bytes(config: RunConfig) -> int:
    """Returns the size of a checkpoint on disk; model.vocab_size must be set."""
    weights = 2 if config.train.dtype == "bf16" else 4
    layers = range(config.model.num_layers)
    memories = config.train.batch_size * memory_bytes(config.model, layers)
    states = sum(_state_bytes(config))
    return sum(layer_parameters(config.model)) * weights + states + memories


class StageNeeds(NamedTuple):
    """The bytes that each rank of a stage keeps during a whole run."""

    parameters: int
    """Number of parameters, not bytes."""
    weights: int
    """Its share of the weights, and of the sums of gradients of those that are trained."""
    optimizer: int
    """Optimizer states on the device."""
    offloaded: int
    """Bytes in the host's memory: optimizer states, and weights and gradients that go with them, or
    the buffers of weights on a disk."""
    memories: int
    """Memories of all its lanes, kept between windows."""

    @property
    def device(self) -> int:
        """Total bytes on the device."""
        return self.weights + self.optimizer + self.memories


def stage_needs(config: RunConfig, world: int) -> list[StageNeeds]:
    """Returns the needs of each stage.

    model.vocab_size must be set, and `world` processes must fit the config.
    """
    data = config.data_parallel_size(world)
    stages = world // data
    model, parallel = config.model, config.parallel
    bounds = balance(model, stages)
    of_stage = partial(_of_stage, model, bounds)
    counts, of_trained, of_states = layer_parameters(model), _trained(config), _state_bytes(config)
    transport = TRANSPORTS[parallel.memory_transport](tuple(bounds))
    units = config.lanes_of_a_rank(data) // config.train.micro_batch_size * config.train.chunks
    buffered = 0
    if parallel.nvme_path:
        room = buffers(model, data)  # and one tensor's new weights on their way to the disk
        buffered = (room.count + 1) * room.numel * weight_bytes(config)
    needs = []
    for stage in range(stages):
        parameters, trained = of_stage(counts, stage), of_stage(of_trained, stage)
        shards = data if parallel.zero_stage else 1
        states = of_stage(of_states, stage) // shards
        weights = parameters * weight_bytes(config) // (data if parallel.zero_stage == 3 else 1)
        gradients = trained * _gradient_bytes(config)
        gradients //= data if parallel.shards_gradients else 1
        on_host = 0
        if parallel.offload_optimizer:
            states, on_host = 0, states + trained * _copy_bytes(config, units) // data
            gradients = 0 if parallel.shards_gradients else gradients
        if parallel.offload_weights:
            weights, on_host = 0, on_host + (buffered if parallel.nvme_path else weights)
        lanes = config.lanes_of_a_rank(data)
        memories = lanes * memory_bytes(model, transport.held(stage))
        needs.append(StageNeeds(parameters, weights + gradients, states, on_host, memories))
    return needs


def process_bytes(config: RunConfig, world: int) -> list[tuple[int, int]]:
    """Returns each rank's bytes on its device, and those of its offloaded optimizer on the host."""
    needs = stage_needs(config, world)
    ranks = world // len(needs)
    return [(stage.device, stage.offloaded) for stage in needs for _ in range(ranks)]


def _of_stage(model: ModelConfig, bounds: list[int], counts: list[int], stage: int) -> int:
    """Sums counts of `layer_list`'s layers over those of a stage."""
    first, end, last_stage = bounds[stage], bounds[stage + 1], len(bounds) - 2
    own = sum(counts[1 + first : 1 + end])
    if stage == 0 or (stage == last_stage and model.tie_embeddings):
        own += counts[0]
    return own + (sum(counts[1 + model.num_layers :]) if stage == last_stage else 0)


def _trained(config: RunConfig) -> list[int]:
    """Counts the parameters that are trained of each layer of `layer_list`."""
    if not config.optimizer.train:
        return layer_parameters(config.model)
    return trained_counts(config.model, config.optimizer.train)


def weight_bytes(config: RunConfig) -> int:
    """Returns the bytes of one weight as it is computed with."""
    return 4 if config.train.dtype == "fp32" else 2


def _gradient_bytes(config: RunConfig) -> int:
    """Returns the bytes of one parameter's gradient."""
    # Only an offloaded optimizer keeps a bf16 gradient beside the sum.
    offloaded = config.train.dtype == "bf16" and config.parallel.offload_optimizer
    return 4 + (2 if offloaded else 0)


def _copy_bytes(config: RunConfig, units: int) -> int:
    """Returns the host's bytes of one parameter beside the states of an offloaded optimizer.

    They are a gradient in fp32 and a sum of gradients, or with ZeRO-1 and 2 a copy of the new
    weight and, if a ZeRO-2 step has several units, a sum of gradients in the weight's precision.
    """
    zero, weight = config.parallel.zero_stage, weight_bytes(config)
    if zero == 3:
        return 4 + 4
    return 4 + weight * (2 if zero == 2 and units > 1 else 1)


def _state_bytes(config: RunConfig) -> list[int]:
    """Returns the bytes of the optimizer's states of each layer of `layer_list`.

    They are the moments of what is trained, and its fp32 copy, which plain fp32 lacks. Muon has one
    moment instead of two.
    """
    each = 8 if config.train.dtype == "fp32" and config.parallel.zero_stage == 0 else 12
    states = [each * trained for trained in _trained(config)]
    if config.optimizer.name == "adamw":
        return states
    matrices = trained_counts(config.model, config.optimizer.train, f"*{PROJECTION}")
    return [both - 4 * single for both, single in zip(states, matrices, strict=True)]


def layer_parameters(model: ModelConfig) -> list[int]:
    """Counts the parameters of layer_list's layers without building any, which takes seconds."""
    layers = [_block_parameters(model.of_layer(layer)) for layer in range(model.num_layers)]
    embedding = model.vocab_size * model.hidden_size
    layers = [embedding, *layers, model.hidden_size]
    head = embedding + (model.vocab_size if model.head_bias else 0)
    return layers if model.tie_embeddings else [*layers, head]


def _block_parameters(model: ModelConfig) -> int:
    hidden, size = model.hidden_size, model.mlp_size
    queries, keys = model.num_heads * model.head_dim, model.kv_heads * model.head_dim
    channels = queries + 2 * keys
    attention = hidden * (channels + queries) + model.num_heads
    attention += channels if model.attention_bias else 0
    attention += hidden if model.attention_out_bias else 0
    attention += 2 * model.head_dim if model.qk_norm else 0
    if model.memory_layers:
        attention += model.kv_heads * (hidden + 1) if model.memory.write_gate else 0
        attention += keys if model.memory.write_gate_sees_keys else 0
    attention += (model.memory.short_conv + 1) * channels if model.memory.short_conv else 0
    feed_forward = 3 * hidden * size + (2 * size + hidden if model.mlp_bias else 0)
    return attention + feed_forward + 2 * hidden


def memory_bytes(model: ModelConfig, layers: range) -> int:
    """Returns the bytes that one lane hands on in these layers, fp32: their memories, and what
    convolutions and sliding windows see."""
    shapes = (state_shapes(model.of_layer(layer)).values() for layer in layers)
    return 4 * sum(math.prod(shape) for own in shapes for shape in own)
