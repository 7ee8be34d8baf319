"""The gate that decides how much of each token is written into the memory, and its statistics."""

from typing import NamedTuple, TypeVar

import torch
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
    """Gives each token and key-value head a write weight in [0, 1], hardsigmoid(x W + k u + b).

    With write_gate_sees_keys, u is a vector for each key-value head, 0 at the beginning. Keys hold
    earlier tokens if there is a convolution, so the gate can open at a word only if others stand
    before it. Without, u is absent.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.kv_heads)
        self.key_weight = None
        if config.memory.write_gate_sees_keys:
            self.key_weight = nn.Parameter(torch.zeros(config.kv_heads, config.head_dim))

    def forward(self, input: Tensor) -> Tensor:
        """Maps hidden states [..., hidden_size] to their part of the gate's input, x W + b,
        [..., kv_heads] in fp32."""
        return super().forward(input).float()

    def weights(self, of_hidden: Tensor, keys: Tensor) -> Tensor:
        """Computes write weights.

        Args:
            of_hidden: what `forward` returned, [..., kv_heads].
            keys: after the convolution and qk_norm, [..., kv_heads, head_dim].

        Returns:
            [..., kv_heads] in fp32.
        """
        if self.key_weight is not None:
            of_hidden = of_hidden + torch.einsum("...hd,hd->...h", keys, self.key_weight).float()
        return F.hardsigmoid(of_hidden)


def write_stats(w: Tensor, valid: Tensor) -> WriteStats:
    """Returns statistics of write weights [..., kv_heads] where `valid`, bool [...], is set."""
    valid = valid[..., None]
    return WriteStats(w.masked_fill(~valid, 0).sum(), ((w.detach() == 0) & valid).sum().to(w.dtype))


def nothing_written(device: torch.device) -> WriteStats:
    """Returns the statistics of a layer that has no memory."""
    return WriteStats(torch.zeros((), device=device), torch.zeros((), device=device))


def write_penalty(config: MemoryConfig, mass: Mass, count: int) -> Mass:
    """Computes what the write weights add to the loss.

    It is memory.write_penalty times the weights' mean in each layer, summed over layers.

    Args:
        mass: sum of some or all write weights over layers, tokens and key-value heads.
        count: number of write weights that a layer has in the whole step, tokens times key-value
            heads; 1 if `mass` is already a sum of means.
    """
    return config.write_penalty * mass / count
