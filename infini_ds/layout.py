"""Describes where documents begin and padding ends in a batch of windows."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")

IGNORE_INDEX = -100
"""Label of a position that has no loss, as in PyTorch's cross-entropy."""


class Layout(NamedTuple):
    """Tells per lane and segment whether a document starts there, and how many tokens are valid.

    The first document of a segment is the only one that may go on from an earlier segment or into
    a later one, so it alone reads the memory and is written to it. In a packed segment, whole
    documents follow it, which begin and end inside the segment and need no memory. Padding comes
    last. A segment without valid tokens (an idle lane of an evaluation) is all padding.

    No tensor may be changed in place.
    """

    starts: Tensor
    """[batch, segments] bool: whether the first document starts here, so that the memory is
    empty."""
    lengths: Tensor
    """[batch, segments] int32: tokens of the first document, 0 to segment_length."""
    begins: Tensor | None = None
    """[batch, segments, segment_length] int32, or None where no segment is packed: for each token,
    the position in the segment at which its document begins (0 for the first document);
    segment_length on padding, so the numbers never fall along a segment."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Layout":
        """Applies a function to each tensor that is there."""
        return Layout(*(None if part is None else change(part) for part in self))  # type: ignore


def memory_tokens(layout: Layout, n: int) -> Tensor:
    """Marks the tokens that read and write the memory, those of each segment's first document.

    Returns:
        bool [batch, segments, n].
    """
    lengths = layout.lengths
    return made_once(
        lengths, (n,), lambda: torch.arange(n, device=lengths.device) < lengths[..., None]
    )


def valid_tokens(layout: Layout, n: int) -> Tensor:
    """Marks all tokens but padding in segments of n tokens, bool [batch, segments, n]."""
    begins = layout.begins
    if begins is None:
        return memory_tokens(layout, n)
    return made_once(begins, ("valid",), lambda: begins < n)


def document_begins(layout: Layout) -> Tensor | None:
    """Returns `begins` with padding as documents of one token, or None if nothing is packed.

    A token at position i sees the positions from begins[i] to i, and its rotary position is
    i - begins[i].
    """
    return None if layout.begins is None else begins_with_padding(layout.begins)


def begins_with_padding(begins: Tensor) -> Tensor:
    """Returns `Layout.begins` with padding as documents of one token."""

    def make() -> Tensor:
        place = torch.arange(begins.shape[-1], dtype=begins.dtype, device=begins.device)
        return torch.minimum(begins, place)

    return made_once(begins, ("clamped",), make)


def document_ends(layout: Layout) -> Tensor | None:
    """Returns the position after each token's document, with padding as in `document_begins`.

    Returns:
        int32 [batch, segments, n], or None if nothing is packed. Never falls along a segment.
    """
    begins = document_begins(layout)
    if begins is None:
        return None

    def make() -> Tensor:
        # Of numbers that never fall: how many are at most a token's own.
        return torch.searchsorted(begins, begins, right=True, out_int32=True)

    return made_once(begins, ("ends",), make)


def whole_weights(layout: Layout, n: int, kv_heads: int) -> Tensor:
    """Weighs what is written to the memory 1 and the rest 0.

    Returns:
        fp32 [batch, segments, kv_heads, n], contiguous.
    """

    def make() -> Tensor:
        written = memory_tokens(layout, n)[:, :, None]
        return written.float().expand(-1, -1, kv_heads, -1).contiguous()

    return made_once(layout.lengths, (n, kv_heads), make)


_made = WeakTensorKeyDictionary()
"""Results derived from a layout's tensors, kept as long as these live."""


def made_once(source: Tensor, key: tuple, make: Callable[[], Made]) -> Made:
    """Keeps what is made of a layout's tensor as long as it lives, since every layer asks for it.

    Args:
        source: one of the layout's tensors, or what was made of one.
        key: name and arguments of what is made.
        make: makes it, without holding on to `source`.
    """
    made: dict[tuple, Made] = _made.setdefault(source, {})  # type: ignore[assignment]
    if key not in made:
        with torch.inference_mode(False):  # training may use the result later
            made[key] = make()
    return made[key]
