"""Reads the tokens, labels and weights of a plan's windows."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from infini_ds.data.lanes import Guests, Plan
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

        def cut(part: Tensor) -> Tensor:
            return part.chunk(chunks, dim=1)[index]

        return Windows(cut(self.tokens), cut(self.labels), self.layout.map(cut), cut(self.weights))

    def to(self, device: torch.device) -> "Windows":
        """Copies the windows to a device without waiting for it."""

        def move(part: Tensor) -> Tensor:
            # A copy from pageable memory would wait for all work queued on the device.
            part = part.pin_memory() if device.type == "cuda" else part
            return part.to(device, non_blocking=True)

        return Windows(
            move(self.tokens), move(self.labels), self.layout.map(move), move(self.weights)
        )


def read_windows(split: Split, plan: Plan, lanes: slice | range, segment_length: int) -> Windows:
    """Reads the windows of some lanes of a plan."""
    n = segment_length
    documents, offsets, lengths, starts = (array[lanes] for array in plan[:4])
    first = split.offsets[documents] + offsets  # [batch, segments]
    # One token more than a segment, for the last label: [batch, segments, segment_length + 1].
    # In a padded segment this reaches beyond its document, and is masked below.
    index = first[..., None] + np.arange(n + 1)
    index = np.minimum(index, len(split.data) - 1)
    tokens = split.data[index].astype(np.int64)
    valid = np.arange(n) < lengths[..., None]
    weights = valid.astype(np.float32)
    if split.weights is not None:
        weights *= split.weights[index[..., 1:]]
    inputs = np.where(valid, tokens[..., :-1], 0)
    labels = np.where(valid, tokens[..., 1:], IGNORE_INDEX)
    begins = None
    if plan.guests is not None:
        begins = np.where(valid, np.int32(0), np.int32(n))
        guests = _guests_of(plan, lanes)
        where, source = _tokens_of(guests, split, n)
        inputs.reshape(-1)[where] = split.data[source]
        labels.reshape(-1)[where] = split.data[source + 1]
        weights.reshape(-1)[where] = 1 if split.weights is None else split.weights[source + 1]
        begins.reshape(-1)[where] = np.repeat(guests.begins, guests.lengths)
    shape = (len(lengths), -1)
    return Windows(
        torch.from_numpy(inputs.reshape(shape)),
        torch.from_numpy(labels.reshape(shape)),
        Layout(
            torch.from_numpy(starts.copy()),
            torch.from_numpy(lengths.copy()),
            None if begins is None else torch.from_numpy(begins),
        ),
        torch.from_numpy(weights.reshape(shape)),
    )


def _guests_of(plan: Plan, lanes: slice | range) -> Guests:
    """Returns the guests of some lanes of a plan; their segments count from the first of these."""
    assert plan.guests is not None
    batch, segments = plan.documents.shape
    chosen = np.arange(batch)[lanes]
    rows = np.full(batch, -1)
    rows[chosen] = np.arange(len(chosen))
    lane, segment = np.divmod(plan.guests.segments, segments)
    own = rows[lane] >= 0
    _, begins, documents, lengths = (array[own] for array in plan.guests)
    return Guests(rows[lane[own]] * segments + segment[own], begins, documents, lengths)


def _tokens_of(guests: Guests, split: Split, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each token of the guests its position in the windows and in the split."""
    sizes = guests.lengths
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    where = np.repeat(guests.segments * n + guests.begins, sizes) + within
    return where, np.repeat(split.offsets[guests.documents], sizes) + within


def total_weight(split: Split, plan: Plan) -> float:
    """Sums the weights of all labels of a plan, over all lanes, without reading tokens."""
    if split.weights is None:
        return float(plan.num_tokens)
    # Where the labels begin, and how many there are.
    begins = (split.offsets[plan.documents] + plan.offsets + 1).reshape(-1)
    lengths = plan.lengths.reshape(-1)
    if plan.guests is not None:
        begins = np.concatenate((begins, split.offsets[plan.guests.documents] + 1))
        lengths = np.concatenate((lengths, plan.guests.lengths))
    return sum(
        float(split.weights[begin : begin + length].sum(dtype=np.float64))
        for begin, length in zip(begins, lengths, strict=True)
    )


def answers_right(losses: Tensor, weights: Tensor, layout: Layout) -> Tensor:
    """Counts the answers that a model gets right while it is trained, and all answers.

    An answer is made of labels that follow one another in a segment and weigh more than 1. It is
    right if each of them has a probability above 1/2, so that greedy decoding would give it.

    Args:
        losses, weights: [lanes, tokens], made of whole segments.
        layout: the layout of the segments.

    Returns:
        [2], fp64: the right answers, and all answers.
    """
    segments = layout.starts.shape[1]
    in_answer = (weights > 1).unflatten(1, (segments, -1))
    begins = in_answer.clone()
    begins[..., 1:] &= ~in_answer[..., :-1]
    wrong = (losses.unflatten(1, (segments, -1)) >= math.log(2)) & in_answer
    # The number of the answer that each label is in, or of the latest before it.
    number = (begins.flatten().cumsum(0) - 1).clamp(min=0)
    mistakes = torch.zeros(number.shape, dtype=torch.float64, device=losses.device)
    mistakes.index_add_(0, number, wrong.flatten().double())
    answers = begins.sum()
    return torch.stack((answers - (mistakes > 0).sum(), answers)).double()
