"""Hands the memory on across ranks that share windows, each of which reads a part of the segments.

A part of a window changes the memory by an affine map, as each of its segments does: S <- A S + B.
The ranks tell each other their maps, and each one applies those of the parts before its own.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Message = Callable[[], Tensor]
"""A message that is on its way; the call waits for it and returns it."""


class Exchange(ABC):
    """Connects the ranks that share windows; all of them must make the same calls."""

    place: int
    """Which part of each window this rank reads, counted from 0."""
    count: int
    """Number of ranks, and of parts."""

    @abstractmethod
    def all_gather(self, own: Tensor) -> Message:
        """Gathers the tensors of all ranks in the order of their places, [count, *own.shape]."""

    @abstractmethod
    def sum_of_own(self, by_place: Tensor) -> Message:
        """Sums over all ranks what they hold for this rank's place, [...].

        Args:
            by_place: [count, ...].
        """


class Kept(Exchange):
    """Keeps what was gathered, so that computing a layer again sends nothing.

    Call `rewind` before the layer is computed, each time.
    """

    def __init__(self, exchange: Exchange):
        self.place, self.count = exchange.place, exchange.count
        self._exchange = exchange
        self._gathered: list[Message] = []
        self._next = 0

    def rewind(self) -> None:
        """Begins again with what was gathered first."""
        self._next = 0

    def all_gather(self, own: Tensor) -> Message:
        if self._next == len(self._gathered):
            self._gathered.append(functools.cache(self._exchange.all_gather(own)))
        message = self._gathered[self._next]
        self._next += 1
        # What autograd gets must not be what is kept, or each would keep the other alive.
        return lambda: message().detach()

    def sum_of_own(self, by_place: Tensor) -> Message:
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


class HandOn:
    """The changes of all parts of a window to some tensors of the memory, on their way.

    What is computed between making this and `finish` takes place while they are sent, and so does
    its backward pass while their gradients are.

    Args:
        own: the change of this rank's part.
    """

    def __init__(self, own: Change, exchange: Exchange):
        self._exchange = exchange
        self._tensors = (own.factor, *own.added)
        message = torch.cat([tensor.flatten() for tensor in self._tensors])
        self._way = _Way(exchange)
        self._marker = _Begin.apply(message, self._way)

    def finish(self, incoming: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Applies the changes.

        Gradients are exact if each rank computes its own losses: each rank receives the sum of what
        the losses of all ranks say about its own change.

        Args:
            incoming: the tensors before the window, which all ranks have.

        Returns:
            The tensors before this rank's part, and those after the window, equal on all ranks.
        """
        gathered: Tensor = _Finish.apply(self._marker, self._way)  # type: ignore[assignment]
        pieces = gathered.split([tensor.numel() for tensor in self._tensors], dim=1)
        factors, *added = (
            piece.unflatten(1, tensor.shape)
            for piece, tensor in zip(pieces, self._tensors, strict=True)
        )
        before = states = list(incoming)
        for place in range(self._exchange.count):
            if place == self._exchange.place:
                before = states
            states = Change(factors[place], [each[place] for each in added]).apply(states)
        # The first rank reads no other's change, yet it has to take part in the backward pass.
        before = [_Beside.apply(state, gathered) for state in before]
        return before, states  # type: ignore[return-value]


@dataclass
class _Way:
    """The messages of one hand-over that are on their way."""

    exchange: Exchange
    changes: Message | None = None
    gradient: Message | None = None


class _Begin(torch.autograd.Function):
    """Sends this rank's change; backward, waits for its gradient. Returns a marker, [0]."""

    @staticmethod
    def forward(ctx, change, way):
        ctx.way = way
        way.changes = way.exchange.all_gather(change)
        return change.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, marker):
        return ctx.way.gradient(), None


class _Finish(torch.autograd.Function):
    """Waits for the changes of all ranks, [count, numbers]; backward, sends their gradients."""

    @staticmethod
    def forward(ctx, marker, way):
        ctx.way = way
        return way.changes()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        ctx.way.gradient = ctx.way.exchange.sum_of_own(gradient.contiguous())
        return gradient.new_empty(0), None


class _Beside(torch.autograd.Function):
    """Returns `state`, as if it depended on `other`."""

    @staticmethod
    def forward(ctx, state, other):
        return state.view_as(state)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient, None  # zeros, which need not be made
