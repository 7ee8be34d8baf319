"""Groups the weights of a checkpoint or an export by their purpose."""

import torch
from torch import Tensor

from infini_ds.config import ModelConfig
from infini_ds.model.layers import layer_list

_INSIDE = {
    ".self_attn.beta": "gates",
    ".self_attn.write_gate.": "write gates",
    ".self_attn.short_conv.": "short convolutions",
    "_norm.": "norms",
    ".self_attn.": "attention",
    ".mlp.": "feed-forward",
    "layernorm.": "norms",
}


def part_of(name: str, num_layers: int) -> str:
    """Returns the part of the model that a parameter of InfiniTransformer belongs to."""
    for inside, part in _INSIDE.items():
        if inside in name:
            return part
    index = int(name.split(".")[1])
    return {0: "embedding", num_layers + 1: "norms"}.get(index, "head")


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Counts the parameters of each part, in the order of the layers, and their "total"."""
    with torch.device("meta"):
        layers = [layer.module(*layer.args) for layer in layer_list(config)]
    counts: dict[str, int] = {}
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            part = part_of(f"layers.{index}.{name}", config.num_layers)
            counts[part] = counts.get(part, 0) + parameter.numel()
    return {**counts, "total": sum(counts.values())}


def is_gate(name: str) -> bool:
    """Whether a parameter holds the gates of a layer."""
    return name.endswith(".self_attn.beta")


def gates(weights: dict[str, Tensor]) -> list[list[float]]:
    """Returns the memory's share in every head, sigmoid(beta): [layers][heads]."""
    names = [name for name in weights if is_gate(name)]
    names.sort(key=lambda name: int(name.split(".")[1]))
    return [weights[name].float().sigmoid().tolist() for name in names]


def relative_changes(
    before: dict[str, Tensor], after: dict[str, Tensor], num_layers: int
) -> dict[str, float | None] | None:
    """Returns the norm of each part's change relative to its norm before; None where that is 0.

    The whole result is None if the two do not have the same parameters.
    """
    if {k: v.shape for k, v in before.items()} != {k: v.shape for k, v in after.items()}:
        return None
    changed: dict[str, float] = {}
    had: dict[str, float] = {}
    for name, old in before.items():
        part = part_of(name, num_layers)
        difference = after[name].double() - old.double()
        changed[part] = changed.get(part, 0.0) + float(difference.square().sum())
        had[part] = had.get(part, 0.0) + float(old.double().square().sum())
    return {part: (changed[part] / had[part]) ** 0.5 if had[part] else None for part in had}
