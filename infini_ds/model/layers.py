"""The ordered list of layers from which one process and the pipeline build the same model."""

import math
from typing import NamedTuple

import torch
from torch import nn

from infini_ds.config import ModelConfig
from infini_ds.model.block import Block, Checkpointing
from infini_ds.model.head import Head
from infini_ds.model.norm import RMSNorm
from infini_ds.model.write_gate import INITIAL_DEVIATION


class Embedding(nn.Embedding):
    """Token embedding; its weight is also the head's when embeddings are tied."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.vocab_size, config.hidden_size)


class FinalNorm(RMSNorm):
    """The norm before the head."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, eps=config.norm_eps)


class Layer(NamedTuple):
    """How to build one layer: its class and its arguments."""

    module: type[nn.Module]
    args: tuple


def layer_list(config: ModelConfig, checkpointing: Checkpointing = "none") -> list[Layer]:
    """Embedding, blocks, final norm, and the head unless it is the embedding itself."""
    blocks = [Layer(Block, (config, checkpointing))] * config.num_layers
    layers = [Layer(Embedding, (config,)), *blocks, Layer(FinalNorm, (config,))]
    return layers if config.tie_embeddings else [*layers, Layer(Head, (config,))]


@torch.no_grad()
def initialize(layer: nn.Module, index: int, config: ModelConfig, seed: int) -> None:
    """Initial weights as a function of seed and place alone, whichever process builds the layer.

    Normal with initializer_range; projections that end a branch are divided by sqrt(2 L) so that
    the residual stream does not grow with depth (GPT-2). Norms are 1, biases and convolutions 0.
    Write gates have a deviation of their own, and are drawn last: all else is as without them.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
    gates_last = sorted(layer.named_parameters(), key=lambda item: _is_write_gate(item[0]))
    for name, parameter in gates_last:
        if parameter.dim() < 2 or name.endswith("short_conv.weight"):
            continue  # norms, biases, gates and convolutions are set where they are made
        ends_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
        scale = math.sqrt(2 * config.num_layers) if ends_branch else 1.0
        deviation = INITIAL_DEVIATION if _is_write_gate(name) else config.initializer_range / scale
        drawn = torch.empty(parameter.shape, dtype=torch.float32)
        drawn.normal_(0, deviation, generator=generator)
        parameter.copy_(drawn)
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()


def _is_write_gate(name: str) -> bool:
    return name.endswith("write_gate.weight")


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the whole model, counted without making them."""
    with torch.device("meta"):
        layers = [layer.module(*layer.args) for layer in layer_list(config)]
    return sum(parameter.numel() for layer in layers for parameter in layer.parameters())
