"""Reading a few tokens at a time through consecutive blocks: one device's, or one stage's."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from infini_ds.kernels.infini_attention import LayerMemory
from infini_ds.model.block import Block
from infini_ds.model.memory import Memory


def extend(blocks: Sequence[Block], hidden: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    """Reads tokens that fit into the open segment of every row, and compresses full segments.

    Args:
        blocks: as many as `memory` has layers.
        hidden: [batch, t, hidden_size], before the first of them.

    Returns:
        Hidden states after the last block, and the memory after the tokens.
    """
    t = hidden.shape[1]
    start = torch.tensor(memory.lengths, device=hidden.device)
    positions = start[:, None] + torch.arange(t, device=hidden.device)
    keys, values = [], []
    for index, (block, layer) in enumerate(zip(blocks, memory.layers(), strict=True)):
        hidden, layer_keys, layer_values = block.extend(
            hidden, layer, memory.keys[index], memory.values[index], positions
        )
        keys.append(layer_keys)
        values.append(layer_values)
    memory = replace(
        memory,
        keys=torch.stack(keys),
        values=torch.stack(values),
        lengths=tuple(length + t for length in memory.lengths),
    )
    return hidden, _close(blocks, memory)


def _close(blocks: Sequence[Block], memory: Memory) -> Memory:
    """Compresses the open segments that are full."""
    full = [length == memory.keys.shape[2] for length in memory.lengths]
    if not any(full):
        return memory
    chosen = torch.tensor(full, device=memory.kv.device)
    layers = []
    for index, (block, layer) in enumerate(zip(blocks, memory.layers(), strict=True)):
        closed = block.self_attn.close(layer, memory.keys[index], memory.values[index])
        layers.append(
            LayerMemory(
                torch.where(chosen[:, None, None, None], closed.kv, layer.kv),
                torch.where(chosen[:, None, None], closed.norm, layer.norm),
            )
        )
    lengths = tuple(
        0 if is_full else length for is_full, length in zip(full, memory.lengths, strict=True)
    )
    return replace(memory.with_layers(layers), lengths=lengths)
