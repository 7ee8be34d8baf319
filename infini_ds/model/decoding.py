"""Reads a few tokens at a time through consecutive blocks, those of a device or of a stage."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from infini_ds.model.block import Block
from infini_ds.model.memory import Memory
from infini_ds.model.write_gate import WriteStats


def extend(
    blocks: Iterable[Block], hidden: Tensor, memory: Memory
) -> tuple[Tensor, Memory, list[WriteStats]]:
    """Reads tokens that fit into the open segment of every row, and compresses full segments.

    Args:
        blocks: one for each layer of `memory`; they are gone through more than once.
        hidden: [batch, t, hidden_size], the input of the first block.

    Returns:
        Hidden states after the last block, the memory after the tokens, and statistics of how much
        of them each layer writes, empty without write gates.
    """
    t = hidden.shape[1]
    start = torch.tensor(memory.lengths, device=hidden.device)
    positions = start[:, None] + torch.arange(t, device=hidden.device)
    used = max(memory.lengths) + t
    segments, writes = [], []
    for block, layer, segment in zip(blocks, memory.layers(), memory.segments(), strict=True):
        hidden, segment, stats = block.extend(hidden, layer, segment, positions, used)
        segments.append(segment)
        if stats is not None:
            writes.append(stats)
    lengths = tuple(length + t for length in memory.lengths)
    return hidden, _close(blocks, memory.with_segments(segments, lengths)), writes


def _close(blocks: Iterable[Block], memory: Memory) -> Memory:
    """Compresses those open segments that are full."""
    full = [length == memory.keys.shape[2] for length in memory.lengths]
    if not any(full):
        return memory
    chosen = torch.tensor(full, device=memory.kv.device)
    layers = []
    for block, layer, segment in zip(blocks, memory.layers(), memory.segments(), strict=True):
        closed = block.self_attn.close(layer, segment)
        layers.append(layer.replaced(chosen, closed))
    lengths = tuple(
        0 if is_full else length for is_full, length in zip(full, memory.lengths, strict=True)
    )
    return replace(memory.with_layers(layers), lengths=lengths)
