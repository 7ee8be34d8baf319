"""How much of each token is written into the memory, and the statistics of it."""

from typing import NamedTuple, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from infini_ds.config import MemoryConfig, ModelConfig

Mass = TypeVar("Mass", Tensor, float)

INITIAL_DEVIATION = 0.02
"""Standard deviation of the initial weights: at the start about half of every token is written."""


class WriteStats(NamedTuple):
    """What one layer wrote of some tokens: fp32 scalars, padding left out."""

    mass: Tensor
    """Sum of the write weights over tokens and key-value heads."""
    zeros: Tensor
    """How many of them are exactly 0, without gradient."""


class WriteGate(nn.Linear):
    """A write weight in [0, 1] for each token and key-value head: hardsigmoid(x W + b)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.kv_heads)

    def forward(self, input: Tensor) -> Tensor:
        """[..., hidden_size] to [..., kv_heads] in fp32."""
        return F.hardsigmoid(super().forward(input).float())


def write_stats(w: Tensor, valid: Tensor) -> WriteStats:
    """Of write weights [..., kv_heads] of the tokens that are valid, [...] bool."""
    valid = valid[..., None]
    return WriteStats(w.masked_fill(~valid, 0).sum(), ((w.detach() == 0) & valid).sum().to(w.dtype))


def write_penalty(config: MemoryConfig, mass: Mass, count: int) -> Mass:
    """What the write weights cost in the loss: their mean in each layer, summed over layers.

    Args:
        mass: sum of some or all write weights over layers, tokens and key-value heads.
        count: number of write weights that a layer has in the whole step, tokens times key-value
            heads; 1 where `mass` is a sum of means already.
    """
    return config.write_penalty * mass / count
