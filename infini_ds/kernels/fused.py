"""Chains of small operators as one kernel: TorchInductor's on GPUs, PyTorch's own elsewhere."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infini_ds.kernels.backend import compiles


def fused(function: Callable[..., Tensor], elsewhere: Callable[..., Any] | None = None):
    """The function, in few passes over memory where its first argument is on a GPU.

    Its gradient too: what lies between is not kept, but computed again from its inputs.

    Args:
        function: of tensors, in PyTorch's operators.
        elsewhere: computes the same where nothing is compiled; None: the function as it is.
    """

    @functools.cache
    def compiled() -> Callable[..., Tensor]:
        # What this imports takes seconds. A pool of processes for so little is not worth its start,
        # in every rank.
        return torch.compile(function, options={"compile_threads": 1})

    @functools.wraps(function)
    def call(x: Tensor, *others: Any) -> Tensor:
        return (compiled() if compiles(x) else elsewhere or function)(x, *others)

    return call
