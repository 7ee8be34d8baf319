"""Computes a run's minimum needs in bytes, without activations and what libraries take."""

import math
from typing import NamedTuple

from infini_ds.config import ModelConfig, RunConfig
from infini_ds.model.layer_state import state_shapes
from infini_ds.parallel.pipeline.balance import balance
from infini_ds.parallel.pipeline.transport import TRANSPORTS


def checkpoint_bytes(config: RunConfig) -> int:
    """Returns the size of a checkpoint on disk; model.vocab_size must be set."""
    weights = 2 if config.train.dtype == "bf16" else 4
    lanes, layers = config.train.batch_size, config.model.num_layers
    memories = lanes * layers * memory_bytes(config.model)
    counts = layer_parameters(config.model)
    states = _state_bytes(config, sum(counts), layers)
    return sum(counts) * weights + states + memories


class StageNeeds(NamedTuple):
    """The bytes that each rank of a stage keeps during a whole run."""

    parameters: int
    """Number of parameters, not bytes."""
    weights: int
    """Weights and the sums of their gradients."""
    optimizer: int
    """Optimizer states on the device."""
    offloaded: int
    """Optimizer states in the host's memory."""
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
    counts = layer_parameters(model)
    embedding, *blocks = counts[: 1 + model.num_layers]
    last = counts[1 + model.num_layers :]
    bounds = balance(model, stages)
    transport = TRANSPORTS[parallel.memory_transport](tuple(bounds))
    needs = []
    for stage in range(stages):
        parameters = sum(blocks[bounds[stage] : bounds[stage + 1]])
        if stage == 0 or (stage == stages - 1 and model.tie_embeddings):
            parameters += embedding
        if stage == stages - 1:
            parameters += sum(last)
        shards = data if parallel.zero_stage else 1
        own_blocks = bounds[stage + 1] - bounds[stage]
        states = _state_bytes(config, parameters, own_blocks) // shards
        here, there = (0, states) if parallel.offload_optimizer else (states, 0)
        lanes = config.lanes_of_a_rank(data)
        memories = lanes * len(transport.held(stage)) * memory_bytes(model)
        weights = parameters * _weight_bytes(config)
        needs.append(StageNeeds(parameters, weights, here, there, memories))
    return needs


def process_bytes(config: RunConfig, world: int) -> list[tuple[int, int]]:
    """Returns each rank's bytes on its device, and those of its offloaded optimizer on the host."""
    needs = stage_needs(config, world)
    ranks = world // len(needs)
    return [(stage.device, stage.offloaded) for stage in needs for _ in range(ranks)]


def _weight_bytes(config: RunConfig) -> int:
    """Returns the bytes of one parameter and its gradient."""
    if config.train.dtype == "fp32":
        return 4 + 4
    # Only an offloaded optimizer keeps a bf16 gradient beside the sum.
    return 2 + 4 + (2 if config.parallel.offload_optimizer else 0)


def _state_bytes(config: RunConfig, parameters: int, blocks: int) -> int:
    """Returns the bytes of parameters' moments and fp32 copies, which plain fp32 lacks.

    Args:
        parameters: number of parameters.
        blocks: number of blocks among them, of whose projections Muon keeps only one moment.
    """
    each = 8 if config.train.dtype == "fp32" and config.parallel.zero_stage == 0 else 12
    saved = 4 * blocks * _projections(config.model) if config.optimizer.name == "muon" else 0
    return each * parameters - saved


def _projections(model: ModelConfig) -> int:
    """Counts the numbers of the projections in a block."""
    heads = 2 * model.num_heads + 2 * model.kv_heads
    return model.hidden_size * (heads * model.head_dim + 3 * model.mlp_size)


def layer_parameters(model: ModelConfig) -> list[int]:
    """Counts the parameters of layer_list's layers without building any, which takes seconds."""
    hidden, size = model.hidden_size, model.mlp_size
    queries, keys = model.num_heads * model.head_dim, model.kv_heads * model.head_dim
    channels = queries + 2 * keys
    attention = model.num_heads
    attention += channels if model.attention_bias else 0
    attention += hidden if model.attention_out_bias else 0
    attention += 2 * model.head_dim if model.qk_norm else 0
    attention += model.kv_heads * (hidden + 1) if model.memory.write_gate else 0
    attention += (model.memory.short_conv + 1) * channels if model.memory.short_conv else 0
    feed_forward = 2 * size + hidden if model.mlp_bias else 0
    block = _projections(model) + attention + feed_forward + 2 * hidden
    embedding = model.vocab_size * hidden
    layers = [embedding, *[block] * model.num_layers, hidden]
    head = embedding + (model.vocab_size if model.head_bias else 0)
    return layers if model.tie_embeddings else [*layers, head]


def memory_bytes(model: ModelConfig) -> int:
    """Returns the bytes that one lane hands on in one layer, fp32: its memory, and what a
    convolution and a sliding window see."""
    return 4 * sum(map(math.prod, state_shapes(model).values()))
