"""Where documents begin and padding ends in a batch of windows."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

IGNORE_INDEX = -100
"""Label of a position without a loss, as in PyTorch's cross-entropy."""


class Layout(NamedTuple):
    """Per lane and segment: does a document start here, and how many tokens are valid.

    The valid tokens of a segment come first, padding after them. A segment without valid tokens
    (an idle lane of an evaluation) is all padding.
    """

    starts: Tensor
    """[batch, segments] bool: the segment reads an empty memory."""
    lengths: Tensor
    """[batch, segments] int32: valid tokens, 0 to segment_length; not to be changed in place."""


def valid_tokens(layout: Layout, n: int) -> Tensor:
    """Which tokens of segments of n are valid, bool [batch, segments, n]."""
    lengths = layout.lengths
    return _once(lengths, (n,), lambda: torch.arange(n, device=lengths.device) < lengths[..., None])


def whole_weights(layout: Layout, n: int, kv_heads: int) -> Tensor:
    """1 for valid tokens and 0 for padding, fp32 [batch, segments, kv_heads, n], contiguous."""

    def make() -> Tensor:
        valid = valid_tokens(layout, n)[:, :, None]
        return valid.float().expand(-1, -1, kv_heads, -1).contiguous()

    return _once(layout.lengths, (n, kv_heads), make)


_made = WeakTensorKeyDictionary()
"""What was made of lengths, as long as they live: every layer asks for the same."""


def _once(lengths: Tensor, sizes: tuple[int, ...], make: Callable[[], Tensor]) -> Tensor:
    made: dict[tuple[int, ...], Tensor] = _made.setdefault(lengths, {})  # type: ignore[assignment]
    if sizes not in made:
        with torch.inference_mode(False):  # training may use it later
            made[sizes] = make()
    return made[sizes]
