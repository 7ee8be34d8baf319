"""The optimizer's parameter groups, AdamW, and the learning rate of each step."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from infini_ds.config import OptimizerConfig

_WITHOUT_DECAY = ("write_gate.weight", "short_conv.weight")


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    embedding: Tensor | None = None,
) -> list[dict]:
    """Sorts parameters into groups, each with its own decay and learning rate.

    `weights` has the matrices, with decay. `no_decay` has norms, biases, the embedding, write gates
    and short convolutions, and with Muon the head: a group of its own would be on the last stage
    alone, and in fp32 DeepSpeed's ZeRO calls all stages together for each group. `gates` has the
    memory gates (beta), without decay and with a learning rate of their own. Empty groups are left
    out, as DeepSpeed would drop them. A stage without attention has no `gates`, so that positions
    differ between stages: each group has a name by which it is found.
    """
    members: dict[str, list[nn.Parameter]] = {"weights": [], "no_decay": [], "gates": []}
    for name, parameter in named_parameters:
        if name.endswith(".beta"):
            members["gates"].append(parameter)
        elif (
            parameter.dim() < 2
            or parameter is embedding
            or name.endswith(_WITHOUT_DECAY)
            or (config.name == "muon" and not name.endswith("_proj.weight"))
        ):
            members["no_decay"].append(parameter)
        else:
            members["weights"].append(parameter)
    multiplier = {"gates": config.gate_learning_rate_multiplier}
    return [
        {
            "name": name,
            "params": parameters,
            "weight_decay": config.weight_decay if name == "weights" else 0.0,
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


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets each group's learning rate to its peak times the factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
