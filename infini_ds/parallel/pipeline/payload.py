"""One packed message per hop between stages, so that no dtype or shape has to be guessed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from infini_ds.config import ModelConfig
from infini_ds.layout import Layout
from infini_ds.memory import MemoryState
from infini_ds.model.layer_state import state_shapes

ALIGNMENT = 16
"""Each part of a message is aligned to this many bytes."""


class Payload(NamedTuple):
    """A chunk of a window on its way through the pipeline."""

    hidden: Tensor
    """[batch, length, hidden_size]"""
    layout: Layout
    """Layout of the chunk."""
    memories: dict[int, MemoryState]
    """Memories that travel with the chunk, by block."""


@dataclass(frozen=True)
class Wire:
    """The format of the messages between two stages, the same for every chunk.

    Bytes of a forward hop: batch x length x hidden_size x (2 in bf16, 4 in fp32), plus batch x
    segments x 2 x 4 for the layout and, if segments are packed, batch x length x 4 for where each
    token's document begins, plus batch x 4 times the numbers of each travelling block's
    `state_shapes`: its memory, if it has one, and what a short convolution and a sliding window
    see next. Hidden states, layout, beginnings, and each block's kv, norm, tail and window are each
    rounded up to 16 bytes. A backward hop consists of the first term alone, the gradient of the
    hidden states. The return from the last stage to the first consists of the memories of all
    layers.
    """

    config: ModelConfig
    batch: int
    """Number of lanes in a micro-batch."""
    segments: int
    """Number of segments in a chunk."""
    dtype: torch.dtype
    """Type of hidden states and their gradients."""
    device: torch.device
    packed: bool = False
    """Whether segments are packed, so that each layout has `begins`."""

    @property
    def hidden_shape(self) -> tuple[int, int, int]:
        """Shape of a chunk's hidden states."""
        length = self.segments * self.config.segment_length
        return self.batch, length, self.config.hidden_size

    def payload_bytes(self, blocks: Sequence[int]) -> int:
        """Returns the bytes of a forward hop that carries these blocks' memories."""
        return _total([*self._head_parts(), *self._memory_parts(blocks)])

    def gradient_bytes(self) -> int:
        """Returns the bytes of a backward hop."""
        return _total(self._head_parts()[:1])

    def memories_bytes(self, blocks: Sequence[int]) -> int:
        """Returns the bytes of the return from the last stage to the first, of these blocks."""
        return _total(self._memory_parts(blocks))

    def pack(self, payload: Payload) -> Tensor:
        """Packs a payload into one uint8 message."""
        starts, lengths, begins = payload.layout
        parts = [payload.hidden.detach(), torch.stack((starts.int(), lengths), dim=-1)]
        parts += [] if begins is None else [begins]
        parts += _tensors(payload.memories)
        return self._write(parts, [*self._head_parts(), *self._memory_parts([*payload.memories])])

    def unpack(self, message: Tensor, blocks: list[int]) -> Payload:
        """Unpacks what `pack` packed; `blocks` are those whose memories travel with it."""
        parts = [*self._head_parts(), *self._memory_parts(blocks)]
        hidden, layout, *others = self._read(message, parts)
        begins = others.pop(0) if self.packed else None
        layout = Layout(layout[..., 0].bool(), layout[..., 1].contiguous(), begins)
        return Payload(hidden, layout, self._memories(others, blocks))

    def pack_memories(self, memories: dict[int, MemoryState]) -> Tensor:
        """Packs the message that returns from the last stage to the first."""
        return self._write(_tensors(memories), self._memory_parts([*memories]))

    def unpack_memories(self, message: Tensor, blocks: list[int]) -> dict[int, MemoryState]:
        """Unpacks what `pack_memories` packed."""
        return self._memories(self._read(message, self._memory_parts(blocks)), blocks)

    def _head_parts(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        segments = (self.batch, self.segments)
        parts = [(self.hidden_shape, self.dtype), ((*segments, 2), torch.int32)]
        if self.packed:
            parts.append(((*segments, self.config.segment_length), torch.int32))
        return parts

    def _memory_parts(self, blocks: Sequence[int]) -> list[tuple[tuple[int, ...], torch.dtype]]:
        shapes = (shape for block in blocks for shape in self._shapes[block].values())
        return [((self.batch, *shape), torch.float32) for shape in shapes]

    @cached_property
    def _shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """The shapes of what each block hands on; found once, not for every message."""
        layers = map(self.config.of_layer, range(self.config.num_layers))
        return [state_shapes(layer) for layer in layers]

    def _memories(self, parts: list[Tensor], blocks: list[int]) -> dict[int, MemoryState]:
        """Undoes `_tensors`."""
        following = iter(parts)
        return {
            block: MemoryState(**{name: next(following) for name in self._shapes[block]})
            for block in blocks
        }

    def _write(self, tensors: list[Tensor], parts: list) -> Tensor:
        message = torch.empty(_total(parts), dtype=torch.uint8, device=self.device)
        for view, tensor in zip(self._read(message, parts), tensors, strict=True):
            assert view.dtype == tensor.dtype
            view.copy_(tensor)
        return message

    def _read(self, message: Tensor, parts: list) -> list[Tensor]:
        views, offset = [], 0
        for shape, dtype in parts:
            size = math.prod(shape) * dtype.itemsize
            views.append(message[offset : offset + size].view(dtype).view(shape))
            offset += _aligned(size)
        return views


def _tensors(memories: dict[int, MemoryState]) -> list[Tensor]:
    """Lists what is there of all memories, block by block."""
    return [tensor for memory in memories.values() for tensor in memory]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _total(parts: list) -> int:
    return sum(_aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in parts)
