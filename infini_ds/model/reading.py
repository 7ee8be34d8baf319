"""Reads texts of any length into a memory, in calls of bounded size."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from infini_ds.config import ModelConfig
from infini_ds.model.memory import Memory
from infini_ds.system.ranges import Weighted, require_finite

WINDOW_SEGMENTS = 16
"""Number of full segments read at once; longer texts are read window by window."""
CALL_TOKENS = 16384
"""Number of tokens that commands read in one call, unless one segment of the batch has more."""


class Reader(Weighted, Protocol):
    """A model that can continue from a memory: InfiniTransformer, or a stand-in for it."""

    config: ModelConfig
    training: bool

    def read(self, tokens: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def train(self, mode: bool = True) -> Any: ...


def call_width(segment_length: int, batch: int = 1) -> int:
    """Returns how many tokens of each row a command reads in one call.

    They are whole segments, and about CALL_TOKENS tokens over all rows.
    """
    segments = CALL_TOKENS // (batch * segment_length)
    return segment_length * max(1, min(WINDOW_SEGMENTS, segments))


@torch.no_grad()
def read_to_last_call(
    model: Reader,
    pieces: Iterable[Tensor],
    memory: Memory | None,
    width: int,
    on_read: Callable[[int], None] | None = None,
) -> tuple[Memory | None, Tensor]:
    """Reads a text except for the tokens of its last call, which are left to the caller.

    At least one token is left, unless the text has none at all.

    Args:
        pieces: consecutive pieces of the text, at least one, [batch, any length] of any integer
            type.
        memory: the memory of documents that the text continues.
        width: number of tokens of each row that a call reads.
        on_read: called with the number of tokens just read, summed over all rows.

    Raises:
        RunError: what the model computes from the text is not finite.

    Returns:
        The memory, and the tokens still to be read, [batch, up to width] on the model's device.
    """
    device = next(iter(model.parameters())).device
    rest: Tensor | None = None
    for piece in pieces:
        rest = piece if rest is None else torch.cat((rest, piece), dim=1)
        while rest.shape[1] > width:
            call, rest = rest[:, :width], rest[:, width:]
            hidden, memory = model.read(_on_device(call, device), memory)
            require_finite(hidden[:, -1], model, "what the model makes of the text is")
            if on_read:
                on_read(call.numel())
    assert rest is not None
    return memory, _on_device(rest, device)


@torch.no_grad()
def read_text(
    model: Reader,
    pieces: Iterable[Tensor],
    memory: Memory | None,
    width: int,
    on_read: Callable[[int], None] | None = None,
) -> tuple[Tensor, Memory]:
    """Reads a whole text, with the arguments and errors of `read_to_last_call`.

    Returns:
        The hidden states of each row's last token, [batch, hidden_size], which are not checked for
        finiteness, and the memory after the text.
    """
    memory, rest = read_to_last_call(model, pieces, memory, width, on_read)
    hidden, memory = model.read(rest, memory)
    if on_read:
        on_read(rest.numel())
    return hidden[:, -1], memory


def _on_device(tokens: Tensor, device: torch.device) -> Tensor:
    return tokens.to(torch.int64).to(device)
