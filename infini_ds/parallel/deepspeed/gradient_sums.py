"""Sums the gradients of a step's units in fp32."""

from functools import partial

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor


def sum_in_fp32(optimizer: BF16_Optimizer) -> None:
    """Installs hooks that add each gradient to its fp32 sum and free it as soon as it exists.

    DeepSpeed by itself keeps all bf16 gradients and moves twice as many bytes: it fills them with
    zeros, adds to them, and copies them to fp32 before they are added again.
    """
    for group, weights in enumerate(optimizer.bf16_groups):
        for place, weight in enumerate(weights):
            add = partial(_add, optimizer, group, place)
            weight.register_post_accumulate_grad_hook(add)


@torch.no_grad()
def _add(optimizer: BF16_Optimizer, group: int, place: int, weight: Tensor) -> None:
    total = optimizer.fp32_groups_gradients[group][place]
    assert weight.grad is not None
    total.add_(weight.grad.view(total.shape))
    optimizer.fp32_groups_has_gradients[group][place] = True
    weight._hp_grad = total  # type: ignore[attr-defined]  # where DeepSpeed looks for it
    weight.grad = None


def gradient_of(parameter: torch.nn.Parameter) -> Tensor:
    """Returns the tensor in which the optimizer in use sums up a parameter's gradient."""
    for name in ("_hp_grad", "grad_accum", "grad"):
        gradient = getattr(parameter, name, None)
        if gradient is not None:
            return gradient
    raise RuntimeError("a parameter got no gradient")
