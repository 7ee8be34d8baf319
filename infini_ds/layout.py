"""Describes where documents begin and padding ends in a batch of windows."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

IGNORE_INDEX = -100
"""Label of a position that has no loss, as in PyTorch's cross-entropy."""


class Layout(NamedTuple):
    """Tells per lane and segment whether a document starts there, and how many tokens are valid.

    The valid tokens of a segment come first and padding follows. A segment without valid tokens
    (an idle lane of an evaluation) is all padding.
    """

    starts: Tensor
    """[batch, segments] bool: whether a document starts here, so that the memory is empty."""
    lengths: Tensor
    """[batch, segments] int32: valid tokens, 0 to segment_length; must not be changed in place."""


def valid_tokens(layout: Layout, n: int) -> Tensor:
    """Marks the valid tokens of segments of n tokens, bool [batch, segments, n]."""
    lengths = layout.lengths
    return _once(lengths, (n,), lambda: torch.arange(n, device=lengths.device) < lengths[..., None])


def whole_weights(layout: Layout, n: int, kv_heads: int) -> Tensor:
    """Weighs valid tokens 1 and padding 0: fp32 [batch, segments, kv_heads, n], contiguous."""

    def make() -> Tensor:
        valid = valid_tokens(layout, n)[:, :, None]
        return valid.float().expand(-1, -1, kv_heads, -1).contiguous()

    return _once(layout.lengths, (n, kv_heads), make)


_made = WeakTensorKeyDictionary()
"""Results derived from lengths, kept as long as these live: every layer asks for the same."""


def _once(lengths: Tensor, sizes: tuple[int, ...], make: Callable[[], Tensor]) -> Tensor:
    made: dict[tuple[int, ...], Tensor] = _made.setdefault(lengths, {})  # type: ignore[assignment]
    if sizes not in made:
        with torch.inference_mode(False):  # training may use the result later
            made[sizes] = make()
    return made[sizes]
