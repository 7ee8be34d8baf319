"""The order of work on one stage: one forward, one backward (1F1B), over chunks of windows.

A window's chunks go forward in order and backward in reverse, because each passes its memory to the
next. So the first backward waits for a whole window, and each stage runs one unit ahead of the next
stage.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Forward(NamedTuple):
    """The forward pass of one chunk of one micro-batch."""

    micro_batch: int
    chunk: int


class Backward(NamedTuple):
    """The backward pass of one chunk of one micro-batch."""

    micro_batch: int
    chunk: int


def train_schedule(
    stage: int, stages: int, micro_batches: int, chunks: int
) -> Iterator[Forward | Backward]:
    """Yields the forward and backward passes of every unit on this stage.

    At most `chunks + stages - stage - 1` units are kept for their backward pass at a time.
    """
    forwards = evaluation_schedule(micro_batches, chunks)
    backwards = (
        Backward(micro_batch, chunk)
        for micro_batch in range(micro_batches)
        for chunk in reversed(range(chunks))
    )
    for _ in range(chunks - 1 + stages - 1 - stage):
        unit = next(forwards, None)
        if unit:
            yield unit
    for backward in backwards:
        unit = next(forwards, None)
        if unit:
            yield unit
        yield backward


def evaluation_schedule(micro_batches: int, chunks: int) -> Iterator[Forward]:
    """Yields the forward pass of every unit, in order."""
    for micro_batch in range(micro_batches):
        for chunk in range(chunks):
            yield Forward(micro_batch, chunk)
