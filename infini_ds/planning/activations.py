"""Finds out what autograd keeps of a block by running it on tensors without data."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from infini_ds.config import ModelConfig
from infini_ds.kernels.launch import HOPPER, recording
from infini_ds.memory.hand_on import Exchange, Message
from infini_ds.model.block import Block, Checkpointing
from infini_ds.model.layer_state import empty_state, told_numbers
from infini_ds.model.transformer import full_layout


class Unit(NamedTuple):
    """The size of a chunk of one micro-batch."""

    batch: int
    segments: int
    dtype: torch.dtype
    ranks: int = 1
    """Number of ranks that share the chunk, each of which has so many segments of it."""


def block_bytes(model: ModelConfig, unit: Unit, checkpointing: Checkpointing) -> int:
    """Returns the bytes that one block keeps of a unit for its backward pass.

    They are its input, the memory that it found, what its operators keep, and what ranks that share
    the chunk told it, but not its weights. They are counted as on a GPU, with the Triton kernels
    where those support the shape.
    """

    def kept(segments: int, ranks: int) -> int:
        return _bytes(model, segments, ranks, unit.dtype, checkpointing)  # type: ignore[arg-type]  # frozen

    # Bytes grow by the same for each segment, and for each rank beyond the second.
    ranks = min(unit.ranks, 2)
    one = kept(1, ranks)
    total = one + (unit.segments - 1) * (kept(2, ranks) - one)
    if unit.ranks > 2:
        total += (unit.ranks - 2) * (kept(1, 3) - one)
    return unit.batch * total


@functools.cache
def _bytes(
    model: ModelConfig,
    segments: int,
    ranks: int,
    dtype: torch.dtype,
    checkpointing: Checkpointing,
) -> int:
    if ranks > 1 and checkpointing != "none":
        # A layer that is computed again keeps what it was told, and else what it keeps alone.
        told = ranks * told_numbers(model) * torch.float32.itemsize
        return told + _bytes(model, segments, 1, dtype, checkpointing)  # type: ignore[arg-type]
    kept = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage  # keeps it alive, so that no other gets its address
        return x

    with FakeTensorMode(), recording(HOPPER):
        block = _block(model, checkpointing, dtype)
        size = (1, segments * model.segment_length, model.hidden_size)
        hidden = torch.empty(size, dtype=dtype, requires_grad=True)
        layout = full_layout(1, segments, model.segment_length, hidden.device)
        memory = empty_state(model, 1)
        exchange = _Silent(ranks) if ranks > 1 else None
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            block(hidden, layout, memory, exchange)
        for x in (hidden, *memory):
            keep(x)
        weights = {weight.untyped_storage()._cdata for weight in block.parameters()}
    return sum(storage.nbytes() for at, storage in kept.items() if at not in weights)


class _Silent(Exchange):
    """Stands for ranks that share a window, whose messages have shapes but no numbers."""

    def __init__(self, count: int):
        self.place, self.count = count - 1, count  # the last keeps no less than the others

    def all_gather(self, own: Tensor) -> Message:
        return lambda: own.new_empty(self.count, *own.shape)

    def sum_of_own(self, by_place: Tensor) -> Message:
        return lambda: torch.empty_like(by_place[0])


def _block(model: ModelConfig, checkpointing: Checkpointing, dtype: torch.dtype) -> Block:
    """Builds the block directly in its type: tensors without data cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Block(model, checkpointing)
    finally:
        torch.set_default_dtype(before)
