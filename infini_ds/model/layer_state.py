"""What a layer of a model passes on along a document: its memory, and what its convolution and its
sliding window see."""

import math

import torch

from infini_ds.config import ModelConfig
from infini_ds.memory import RULES
from infini_ds.memory.state import MemoryState


def state_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of one lane's tensors by their names in `MemoryState`.

    Args:
        config: that of a layer, see `ModelConfig.of_layer`; so it is in this whole module.
    """
    shapes = memory_shapes(config)
    if config.memory.short_conv:
        shapes["tail"] = tail_shape(config)
    if config.use_sliding_window:
        shapes["window"] = window_shape(config)
    return shapes


def memory_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a lane's compressive memory; without one, it has no features."""
    assert config.memory.layers in (None, ()), "must be the config of a layer"
    shapes = RULES[config.memory_rule].specs(config.kv_heads, config.head_dim)
    if not config.memory_layers:
        kv_heads, _, d = shapes["kv"]
        shapes |= {"kv": (kv_heads, 0, d), "norm": (kv_heads, 0)}
    return shapes


def tail_shape(config: ModelConfig) -> tuple[int, int, int]:
    """Returns the shape of the last tokens that a lane's convolution sees."""
    return config.memory.short_conv, config.num_heads + 2 * config.kv_heads, config.head_dim


def window_shape(config: ModelConfig) -> tuple[int, int, int]:
    """Returns the shape of the keys and values before a segment that a lane's tokens attend to."""
    tokens = config.segment_length if config.use_sliding_window else 0
    return tokens, 2 * config.kv_heads, config.head_dim


def empty_state(
    config: ModelConfig, batch: int, device: torch.device | str | None = None
) -> MemoryState:
    """Makes the states of documents of which nothing has been read yet."""
    shapes = state_shapes(config).items()
    return MemoryState(
        **{name: torch.zeros(batch, *shape, device=device) for name, shape in shapes}
    )


def told_numbers(config: ModelConfig) -> int:
    """Returns how many numbers each of the ranks that share a window tells the others about a lane
    and a layer: its part's change of the memory, and what the convolution and the sliding window
    see of the part's end, each with the number that this replaces what was seen before."""
    numbers = 0
    if config.memory_layers:
        numbers = RULES[config.memory_rule].handed_on(config.kv_heads, config.head_dim)
    seen = (math.prod(shape(config)) for shape in (tail_shape, window_shape))
    return numbers + sum(count + 1 for count in seen if count)
