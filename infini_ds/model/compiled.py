"""Compiles parts of blocks with TorchInductor, once for all blocks of a process."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Method = TypeVar("Method", bound=Callable)


def compiled_in_training(method: Method) -> Method:
    """Compiles a block's method in training, if the block's `compiled` is set.

    Weights are inputs of the compiled code, so that all blocks share it. Chunks of training have
    one shape; evaluation and generation, which have many, run the method as it is.
    """

    @functools.cache
    def compiled() -> Callable:
        # Importing the compiler takes seconds. For so few kernels a pool of compile processes in
        # every rank is not worth starting.
        return torch.compile(method, fullgraph=True, dynamic=False, options={"compile_threads": 1})

    @functools.wraps(method)
    def call(self: Any, *args: Any) -> Any:
        return (compiled() if self.compiled and self.training else method)(self, *args)

    return call  # type: ignore[return-value]
