"""Reads the tokens, labels and weights of a plan's windows."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from infini_ds.data.lanes import Plan
from infini_ds.data.store import Split
from infini_ds.layout import IGNORE_INDEX, Layout


class Windows(NamedTuple):
    """The content of some lanes in one step: [batch, window_segments * segment_length]."""

    tokens: Tensor
    """int64; 0 on padding."""
    labels: Tensor
    """int64: the document's next token, also across the ends of segments; -100 on padding."""
    layout: Layout
    weights: Tensor
    """fp32: loss weight of each label; 0 on padding."""
    corrupt: Tensor | None = None
    """[batch] bool: lanes that held tokens outside the vocabulary, which were replaced."""

    def chunk(self, chunks: int, index: int) -> "Windows":
        """Returns one of `chunks` equal parts of the windows, each made of whole segments."""
        tokens, labels, weights, *layout = (
            part.chunk(chunks, dim=1)[index]
            for part in (self.tokens, self.labels, self.weights, *self.layout)
        )
        return Windows(tokens, labels, Layout(*layout), weights)

    def to(self, device: torch.device) -> "Windows":
        """Copies the windows to a device without waiting for it."""

        def move(part: Tensor) -> Tensor:
            # A copy from pageable memory would wait for all work queued on the device.
            part = part.pin_memory() if device.type == "cuda" else part
            return part.to(device, non_blocking=True)

        layout = Layout(*map(move, self.layout))
        return Windows(move(self.tokens), move(self.labels), layout, move(self.weights))


def read_windows(split: Split, plan: Plan, lanes: slice | range, segment_length: int) -> Windows:
    """Reads the windows of some lanes of a plan."""
    documents, offsets, lengths, starts = (array[lanes] for array in plan)
    first = split.offsets[documents] + offsets  # [batch, segments]
    # One token more than a segment, for the last label: [batch, segments, segment_length + 1].
    # In a padded segment this reaches beyond its document, and is masked below.
    index = first[..., None] + np.arange(segment_length + 1)
    index = np.minimum(index, len(split.data) - 1)
    tokens = split.data[index].astype(np.int64)
    valid = np.arange(segment_length) < lengths[..., None]
    weights = valid.astype(np.float32)
    if split.weights is not None:
        weights *= split.weights[index[..., 1:]]
    shape = (len(lengths), -1)
    return Windows(
        torch.from_numpy(np.where(valid, tokens[..., :-1], 0).reshape(shape)),
        torch.from_numpy(np.where(valid, tokens[..., 1:], IGNORE_INDEX).reshape(shape)),
        Layout(torch.from_numpy(starts.copy()), torch.from_numpy(lengths.copy())),
        torch.from_numpy(weights.reshape(shape)),
    )


def total_weight(split: Split, plan: Plan) -> float:
    """Sums the weights of all labels of a plan, over all lanes, without reading tokens."""
    if split.weights is None:
        return float(plan.num_tokens)
    begins = split.offsets[plan.documents] + plan.offsets + 1  # where the labels begin
    return sum(
        float(split.weights[begin : begin + length].sum(dtype=np.float64))
        for begin, length in zip(begins.flat, plan.lengths.flat, strict=True)
    )


def answers_right(losses: Tensor, weights: Tensor, layout: Layout) -> Tensor:
    """Counts the answers that a model gets right while it is trained, and all answers.

    An answer is made of the labels of a segment whose weight is above 1. It is right if each of
    them has a probability above 1/2, so that greedy decoding would give it.

    Args:
        losses, weights: [lanes, tokens], made of whole segments.
        layout: the layout of the segments.

    Returns:
        [2], fp64: the right answers, and all answers.
    """
    segments = layout.starts.shape[1]
    answer = (weights > 1).unflatten(1, (segments, -1))
    wrong = (losses.unflatten(1, (segments, -1)) >= math.log(2)) & answer
    answered = answer.any(dim=-1)
    right = answered & ~wrong.any(dim=-1)
    return torch.stack((right.sum(), answered.sum())).double()
