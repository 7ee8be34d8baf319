"""Texts of any length, read into a memory in calls of bounded size."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from infini_ds.config import ModelConfig
from infini_ds.model.memory import Memory
from infini_ds.system.ranges import Weighted, require_finite

WINDOW_SEGMENTS = 16
"""Whole segments that a call reads at once; longer texts are read window by window."""
CALL_TOKENS = 16384
"""Tokens that the commands read in one call, unless one segment of the batch has more."""


class Reader(Weighted, Protocol):
    """A model that reads on from a memory: InfiniTransformer, or what stands in for it."""

    config: ModelConfig
    training: bool

    def read(self, tokens: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def train(self, mode: bool = True) -> Any: ...


def call_width(segment_length: int, batch: int = 1) -> int:
    """Tokens a row that a call of a command reads: whole segments, about CALL_TOKENS together."""
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
    """Reads a text but for its last call, which is never empty unless there are no tokens at all.

    Args:
        pieces: of the text, one after another, [batch, any length] of any type of integers; at
            least one.
        memory: of documents that the text goes on with.
        width: tokens a row that a call reads.
        on_read: called with the number of tokens just read, of all rows together.

    Raises:
        RunError: what the model makes of the text is not finite.

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
    """Reads a whole text; its arguments and errors are those of `read_to_last_call`.

    Returns:
        The hidden states of each row's last token, [batch, hidden_size], which are not checked,
        and the memory after the text.
    """
    memory, rest = read_to_last_call(model, pieces, memory, width, on_read)
    hidden, memory = model.read(rest, memory)
    if on_read:
        on_read(rest.numel())
    return hidden[:, -1], memory


def _on_device(tokens: Tensor, device: torch.device) -> Tensor:
    return tokens.to(torch.int64).to(device)
