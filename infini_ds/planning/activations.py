"""Finds out what autograd keeps of a block by running it on tensors without data."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from infini_ds.config import ModelConfig
from infini_ds.kernels.launch import HOPPER, recording
from infini_ds.memory import MemoryState
from infini_ds.model.block import Block, Checkpointing
from infini_ds.model.transformer import full_layout


class Unit(NamedTuple):
    """The size of a chunk of one micro-batch."""

    batch: int
    segments: int
    dtype: torch.dtype


def block_bytes(model: ModelConfig, unit: Unit, checkpointing: Checkpointing) -> int:
    """Returns the bytes that one block keeps of a unit for its backward pass.

    They are its input, the memory that it found and what its operators keep, but not its weights.
    They are counted as on a GPU, with the Triton kernels where those support the shape.
    """
    one, two = (
        _bytes(model, segments, unit.dtype, checkpointing)  # type: ignore[arg-type]  # frozen
        for segments in (1, 2)
    )
    return unit.batch * (one + (unit.segments - 1) * (two - one))


@functools.cache
def _bytes(
    model: ModelConfig, segments: int, dtype: torch.dtype, checkpointing: Checkpointing
) -> int:
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
        memory = MemoryState.empty(1, model.kv_heads, model.head_dim)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            block(hidden, layout, memory)
        for x in (hidden, *memory):
            keep(x)
        weights = {weight.untyped_storage()._cdata for weight in block.parameters()}
    return sum(storage.nbytes() for at, storage in kept.items() if at not in weights)


def _block(model: ModelConfig, checkpointing: Checkpointing, dtype: torch.dtype) -> Block:
    """Builds the block directly in its type: tensors without data cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Block(model, checkpointing)
    finally:
        torch.set_default_dtype(before)
