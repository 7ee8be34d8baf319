"""The optimizer's parameter groups, AdamW, and the learning rate of each step."""

import math
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from infini_ds.config import OptimizerConfig

EMBEDDING = "layers.0.weight"
PROJECTION = "_proj.weight"
"""How the names of a block's matrices end, which Muon makes orthogonal."""
_WITHOUT_DECAY = ("write_gate.weight", "write_gate.key_weight", "short_conv.weight")


def group_of(name: str, parameter: Tensor, optimizer: str) -> str:
    """Returns the name of a parameter's group.

    `weights` has the matrices, with decay. `no_decay` has norms, biases, the embedding, write gates
    and short convolutions, and with Muon the head: a group of its own would be on the last stage
    alone, and in fp32 DeepSpeed's ZeRO calls all stages together for each group. `gates` has the
    memory gates (beta), without decay and with a learning rate of their own.

    Args:
        name: in InfiniTransformer.
        optimizer: optimizer.name.
    """
    if name.endswith(".beta"):
        return "gates"
    shape = getattr(parameter, "ds_shape", parameter.shape)  # what ZeRO-3 shares out has no shape
    if len(shape) < 2 or name == EMBEDDING or name.endswith(_WITHOUT_DECAY):
        return "no_decay"
    return "weights" if optimizer == "adamw" or name.endswith(PROJECTION) else "no_decay"


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    frozen: Collection[str] = (),
) -> list[dict]:
    """Sorts the parameters that are trained into groups, each with its decay and learning rate.

    Empty groups are left out, as DeepSpeed would drop them.

    Args:
        named_parameters: parameters by their names in InfiniTransformer.
        frozen: names of parameters that keep their values; one that needs a gradient all the same
            is alone in its group.
    """
    members: dict[str, list[nn.Parameter]] = {"weights": [], "no_decay": [], "gates": []}
    decays = {"weights": config.weight_decay}
    multiplier = {"gates": config.gate_learning_rate_multiplier}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            group = group_of(name, parameter, config.name)
            members[group].append(parameter)
            if name in frozen:
                decays[group] = 0.0
    return [
        {
            "name": name,
            "params": parameters,
            "weight_decay": decays.get(name, 0.0),
            "lr": config.learning_rate * multiplier.get(name, 1.0),
            "peak_lr": config.learning_rate * multiplier.get(name, 1.0),
        }
        for name, parameters in members.items()
        if parameters
    ]


def adamw(groups: list[dict], config: OptimizerConfig) -> torch.optim.AdamW:
    """Makes AdamW over the groups, fused so that a step passes over the states without copies."""
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """Returns the learning rate of a step, counted from 0, relative to the peak.

    It depends on the step alone, so that resuming needs no scheduler state.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    floor = config.min_learning_rate_ratio
    if config.schedule == "cosine":
        share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    decay = config.decay_steps or max(1, steps // 5)
    return floor + (1 - floor) * min(1.0, max(0.0, (steps - step) / decay))


def write_penalty_factor(step: int, config: OptimizerConfig) -> float:
    """Returns the write penalty of a step, counted from 0, relative to its value in the config.

    A penalty that is high from the first step on closes write gates before there is anything to
    learn from what they let through.
    """
    return min(1.0, (step + 1) / max(1, config.write_penalty_warmup_steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets each group's learning rate to its peak times the factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
