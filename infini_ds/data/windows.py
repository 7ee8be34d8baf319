"""Tokens and labels of a plan's windows."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from infini_ds.data.lanes import Plan
from infini_ds.data.store import Split
from infini_ds.layout import Layout

IGNORED = -100
"""Label of a position without a loss, as in PyTorch's cross-entropy."""


class Windows(NamedTuple):
    """What some lanes read in one step: [batch, window_segments * segment_length]."""

    tokens: Tensor
    """int64; 0 on padding."""
    labels: Tensor
    """int64: the next token of the document, across segments' ends too; -100 on padding."""
    layout: Layout


def read_windows(split: Split, plan: Plan, lanes: slice | range, segment_length: int) -> Windows:
    """Reads the windows of some lanes of a plan."""
    documents, offsets, lengths, starts = (array[lanes] for array in plan)
    first = split.offsets[documents] + offsets  # [batch, segments]
    # One token more than a segment, for the last label: [batch, segments, segment_length + 1].
    # Where a segment is padded this reaches beyond its document, and is masked below.
    index = first[..., None] + np.arange(segment_length + 1)
    tokens = split.data[np.minimum(index, len(split.data) - 1)].astype(np.int64)
    valid = np.arange(segment_length) < lengths[..., None]
    shape = (len(lengths), -1)
    return Windows(
        torch.from_numpy(np.where(valid, tokens[..., :-1], 0).reshape(shape)),
        torch.from_numpy(np.where(valid, tokens[..., 1:], IGNORED).reshape(shape)),
        Layout(torch.from_numpy(starts.copy()), torch.from_numpy(lengths.copy())),
    )
