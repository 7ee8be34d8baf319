"""Where documents begin and padding ends in a batch of windows."""

from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """Per lane and segment: does a document start here, and how many tokens are valid.

    The valid tokens of a segment come first, padding after them. A segment without valid tokens
    (an idle lane of an evaluation) is all padding.
    """

    starts: Tensor
    """[batch, segments] bool: the segment reads an empty memory."""
    lengths: Tensor
    """[batch, segments] int32: valid tokens, 0 to segment_length."""
