"""What a layer of a model passes on along a document: its memory and what its convolution sees."""

import torch

from infini_ds.config import ModelConfig
from infini_ds.memory import RULES
from infini_ds.memory.state import MemoryState


def state_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of one lane's tensors by their names in `MemoryState`."""
    shapes = RULES[config.memory_rule].specs(config.kv_heads, config.head_dim)
    if config.memory.short_conv:
        shapes["tail"] = tail_shape(config)
    return shapes


def tail_shape(config: ModelConfig) -> tuple[int, int, int]:
    """Returns the shape of the last tokens that a lane's convolution sees."""
    return config.memory.short_conv, config.num_heads + 2 * config.kv_heads, config.head_dim


def empty_state(
    config: ModelConfig, batch: int, device: torch.device | str | None = None
) -> MemoryState:
    """Makes the states of documents of which nothing has been read yet."""
    shapes = state_shapes(config).values()
    return MemoryState(*(torch.zeros(batch, *shape, device=device) for shape in shapes))


def told_numbers(config: ModelConfig) -> int:
    """Returns how many numbers each of the ranks that share a window tells the others about a lane
    and a layer: its part's change of the memory, and what the convolution sees of the part's end
    with the number that this replaces what was seen before."""
    numbers = RULES[config.memory_rule].handed_on(config.kv_heads, config.head_dim)
    taps, channels, d = tail_shape(config)
    return numbers + (taps * channels * d + 1 if taps else 0)
