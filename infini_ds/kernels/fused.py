"""Fuses chains of small operators into one kernel with TorchInductor on GPUs."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infini_ds.kernels.backend import compiles


def fused(function: Callable[..., Tensor], elsewhere: Callable[..., Any] | None = None):
    """Makes a function that takes few passes over memory if its first argument is on a GPU.

    So does its gradient, for which intermediate results are recomputed from the inputs instead of
    being kept.

    Args:
        function: a function of tensors, written with PyTorch's operators.
        elsewhere: computes the same where nothing is compiled; None runs `function` as it is.
    """

    @functools.cache
    def compiled() -> Callable[..., Tensor]:
        # Importing the compiler takes seconds. For so few kernels a pool of compile processes in
        # every rank is not worth starting.
        return torch.compile(function, options={"compile_threads": 1})

    @functools.wraps(function)
    def call(x: Tensor, *others: Any) -> Tensor:
        if torch.compiler.is_compiling():  # fused with what is around it
            return function(x, *others)
        return (compiled() if compiles(x) else elsewhere or function)(x, *others)

    return call
