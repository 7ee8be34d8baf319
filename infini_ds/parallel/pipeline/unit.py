"""One chunk of one micro-batch on one stage, between its forward and its backward pass."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function


class Scale(NamedTuple):
    """Gradients of a step's loss with respect to its outputs."""

    loss: float
    """Gradient with respect to the summed losses."""
    mass: float
    """Gradient with respect to the summed write weights, which the write penalty adds."""


@dataclass
class Unit:
    """Everything that the backward pass of a unit needs."""

    inputs: Tensor
    """Tokens, or hidden states that receive a gradient."""
    memory_in: list[Tensor]
    """Tensors of each block's memory before the chunk, flat; they receive gradients in a window."""
    output: Tensor
    """Hidden states, or the summed loss on the last stage."""
    memory_out: list[Tensor]
    """Tensors of each block's memory after the chunk, flat."""
    mass: Tensor | None
    """Sum of this stage's write weights, if it has write gates."""

    def outputs(
        self, gradient: Tensor, mass: float, of_memory: list[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the outputs that receive gradients, and these.

        Outputs that depend on nothing that is trained receive none.

        Args:
            gradient: of the output.
            mass: gradient of the summed write weights.
            of_memory: gradients that the window's next chunk left for the tensors of `memory_out`;
                empty for the last chunk.
        """
        found: list[tuple[Tensor, Tensor | None]] = [(self.output, gradient)]
        if self.mass is not None:
            found.append((self.mass, torch.full_like(self.mass, mass)))
        if of_memory:
            found += zip(self.memory_out, of_memory, strict=True)
        received = [(out, own) for out, own in found if out.requires_grad and own is not None]
        return [out for out, _ in received], [own for _, own in received]


def traced(name: str) -> AbstractContextManager:
    """Names a part of the work in a trace, while one is made."""
    if torch.autograd.profiler._is_profiler_enabled:
        return record_function(name)
    return nullcontext()
