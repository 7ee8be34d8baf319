"""Hands the memory on across ranks that share windows, each of which reads a part of the segments.

A part of a window changes the memory by an affine map, as each of its segments does: S <- A S + B.
The ranks tell each other their maps, and each one applies those of the parts before its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Exchange(ABC):
    """Connects the ranks that share windows; all of them must make the same calls."""

    place: int
    """Which part of each window this rank reads, counted from 0."""
    count: int
    """Number of ranks, and of parts."""

    @abstractmethod
    def all_gather(self, own: Tensor) -> Tensor:
        """Returns the tensors of all ranks in the order of their places, [count, *own.shape]."""

    @abstractmethod
    def sum_of_own(self, by_place: Tensor) -> Tensor:
        """Sums over all ranks what they hold for this rank's place.

        Args:
            by_place: [count, ...].

        Returns:
            [...]
        """


class Kept(Exchange):
    """Keeps what was gathered, so that computing a layer again sends nothing.

    Call `rewind` before the layer is computed, each time.
    """

    def __init__(self, exchange: Exchange):
        self.place, self.count = exchange.place, exchange.count
        self._exchange = exchange
        self._gathered: list[Tensor] = []
        self._next = 0

    def rewind(self) -> None:
        """Begins again with what was gathered first."""
        self._next = 0

    def all_gather(self, own: Tensor) -> Tensor:
        if self._next == len(self._gathered):
            self._gathered.append(self._exchange.all_gather(own))
        self._next += 1
        # What autograd gets must not be what is kept, or each would keep the other alive.
        return self._gathered[self._next - 1].detach()

    def sum_of_own(self, by_place: Tensor) -> Tensor:
        return self._exchange.sum_of_own(by_place)


class Change(NamedTuple):
    """The map by which a part of a window changes some tensors of the memory."""

    factor: Tensor
    """A: [batch], 1 or 0 without a gradient, or a matrix [batch, kv_heads, d, d]; 0 if a document
    begins in the part."""
    added: Sequence[Tensor]
    """B, one for each tensor of the memory: what the part adds since the last such beginning."""

    def apply(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Returns the memory's tensors after the part, from those before it."""
        return [self._kept(state) + added for state, added in zip(states, self.added, strict=True)]

    def _kept(self, state: Tensor) -> Tensor:
        if self.factor.dim() > 1:
            return self.factor @ state
        # A product with 0 would keep numbers that are not finite.
        begins = (self.factor == 0).view(-1, *[1] * (state.dim() - 1))
        return state.masked_fill(begins, 0)


def hand_on(
    own: Change, incoming: Sequence[Tensor], exchange: Exchange
) -> tuple[list[Tensor], list[Tensor]]:
    """Applies the changes of all parts of a window to some tensors of the memory.

    Gradients are exact if each rank computes its own losses: each rank receives the sum of what the
    losses of all ranks say about its own change.

    Args:
        own: the change of this rank's part.
        incoming: the tensors before the window, which all ranks have.

    Returns:
        The tensors before this rank's part, and those after the window, equal on all ranks.
    """
    tensors = (own.factor, *own.added)
    message = torch.cat([tensor.flatten() for tensor in tensors])
    gathered: Tensor = _Gather.apply(message, exchange)  # type: ignore[assignment]
    pieces = gathered.split([tensor.numel() for tensor in tensors], dim=1)
    factors, *added = (
        piece.unflatten(1, tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)
    )
    before = states = list(incoming)
    for place in range(exchange.count):
        if place == exchange.place:
            before = states
        states = Change(factors[place], [each[place] for each in added]).apply(states)
    # The first rank reads no other's change, and yet has to take part in the backward pass.
    before = [_Beside.apply(state, gathered) for state in before]
    return before, states  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    """Gathers the ranks' messages, [count, numbers]; backward, sums the gradients of each one."""

    @staticmethod
    def forward(ctx, message, exchange):
        ctx.exchange = exchange
        return exchange.all_gather(message)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return ctx.exchange.sum_of_own(gradient.contiguous()), None


class _Beside(torch.autograd.Function):
    """Returns `state`, as if it depended on `other`."""

    @staticmethod
    def forward(ctx, state, other):
        return state.view_as(state)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient, None  # zeros, which need not be made
