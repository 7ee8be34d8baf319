"""The gate that decides how much of each token is written into the memory, and its statistics."""

from typing import NamedTuple, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from infini_ds.config import MemoryConfig, ModelConfig

Mass = TypeVar("Mass", Tensor, float)

INITIAL_DEVIATION = 0.02
"""Standard deviation of the initial weights, with which about half of each token is written."""


class WriteStats(NamedTuple):
    """Statistics of one layer's write weights as fp32 scalars, without padding."""

    mass: Tensor
    """Sum of the write weights over tokens and key-value heads."""
    zeros: Tensor
    """Number of write weights that are exactly 0, without gradient."""


class WriteGate(nn.Linear):
    """Gives each token and key-value head a write weight in [0, 1], hardsigmoid(x W + b)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.kv_heads)

    def forward(self, input: Tensor) -> Tensor:
        """Maps [..., hidden_size] to [..., kv_heads] in fp32."""
        return F.hardsigmoid(super().forward(input).float())


def write_stats(w: Tensor, valid: Tensor) -> WriteStats:
    """Returns statistics of write weights [..., kv_heads] where `valid`, bool [...], is set."""
    valid = valid[..., None]
    return WriteStats(w.masked_fill(~valid, 0).sum(), ((w.detach() == 0) & valid).sum().to(w.dtype))


def write_penalty(config: MemoryConfig, mass: Mass, count: int) -> Mass:
    """Computes what the write weights add to the loss.

    It is memory.write_penalty times the weights' mean in each layer, summed over layers.

    Args:
        mass: sum of some or all write weights over layers, tokens and key-value heads.
        count: number of write weights that a layer has in the whole step, tokens times key-value
            heads; 1 if `mass` is already a sum of means.
    """
    return config.write_penalty * mass / count
