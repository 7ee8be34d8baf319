"""The ordered list of layers from which a single process and the pipeline build the same model."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from infini_ds.config import ModelConfig
from infini_ds.model.block import Block, Checkpointing
from infini_ds.model.head import Head
from infini_ds.model.norm import RMSNorm
from infini_ds.model.write_gate import INITIAL_DEVIATION


class Embedding(nn.Embedding):
    """The token embedding, which shares its weight with the head if embeddings are tied."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.vocab_size, config.hidden_size)


class FinalNorm(RMSNorm):
    """The norm before the head."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, eps=config.norm_eps)


class Layer(NamedTuple):
    """The class and the arguments from which one layer is built."""

    module: type[nn.Module]
    args: tuple


def layer_list(config: ModelConfig, checkpointing: Checkpointing = "none") -> list[Layer]:
    """Lists the embedding, blocks, final norm, and the head unless it is tied to the embedding."""
    blocks = [
        Layer(Block, (config.of_layer(layer), checkpointing)) for layer in range(config.num_layers)
    ]
    layers = [Layer(Embedding, (config,)), *blocks, Layer(FinalNorm, (config,))]
    return layers if config.tie_embeddings else [*layers, Layer(Head, (config,))]


@torch.no_grad()
def initialize(layer: nn.Module, index: int, config: ModelConfig, seed: int) -> None:
    """Sets a layer's initial weights, which depend on the seed and the layer's index alone.

    They are the same whichever process builds the layer. Weights are normally distributed
    with deviation initializer_range, divided by sqrt(2 L) in projections that end a branch so that
    the residual stream does not grow with depth (GPT-2). Norms are 1 and biases 0. The embedding
    may have a deviation of its own. Write gates have one, and are drawn last so that all other
    weights are the same as without them. With a convolution, keys begin as queries of earlier
    tokens, see `InfiniAttention.begin_with_induction`.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
    gates_last = sorted(layer.named_parameters(), key=lambda item: _is_write_gate(item[0]))
    for name, parameter in gates_last:
        if parameter.dim() < 2 or name.endswith(("short_conv.weight", "write_gate.key_weight")):
            continue  # set by the constructors or below
        deviation = config.initializer_range
        if isinstance(layer, Embedding):
            deviation = config.embedding_initializer_range or deviation
        elif _is_write_gate(name):
            deviation = INITIAL_DEVIATION
        elif name.endswith(("o_proj.weight", "down_proj.weight")):  # they end a branch
            deviation /= math.sqrt(2 * config.num_layers)
        drawn = torch.empty(parameter.shape, dtype=torch.float32)
        drawn.normal_(0, deviation, generator=generator)
        parameter.copy_(drawn)
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    if isinstance(layer, Block):
        layer.self_attn.begin_with_induction()


def _is_write_gate(name: str) -> bool:
    return name.endswith("write_gate.weight")


def layer_shapes(config: ModelConfig) -> list[dict[str, Tensor]]:
    """Returns the parameters of each layer of `layer_list` as meta tensors, by their names in
    InfiniTransformer."""
    layers = layer_list(config)
    with torch.device("meta"):
        made = {layer: layer.module(*layer.args) for layer in dict.fromkeys(layers)}
    return [
        {f"layers.{place}.{name}": p for name, p in made[layer].named_parameters()}
        for place, layer in enumerate(layers)
    ]


def count_parameters(config: ModelConfig) -> int:
    """Counts the parameters of the whole model without allocating them."""
    return sum(meta.numel() for layer in layer_shapes(config) for meta in layer.values())
