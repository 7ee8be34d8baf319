"""Generates text through the stages without gathering the model anywhere."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from infini_ds.model.block import Block
from infini_ds.model.decoding import extend
from infini_ds.model.generation import Sampling, sample
from infini_ds.model.memory import Memory
from infini_ds.parallel.part import Part
from infini_ds.parallel.pipeline.stage import Stage


class StageEngine(Protocol):
    """The members of a stage's engine that generation needs."""

    module: Stage
    device: torch.device
    part: Part

    def whole(self, module: nn.Module) -> AbstractContextManager: ...

    def from_last(self, value: Tensor) -> Tensor: ...

    def send_hidden(self, hidden: Tensor) -> None: ...

    def receive_hidden(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...


@torch.no_grad()
def generate(
    engine: StageEngine, prompt: list[int], max_new_tokens: int, temperature: float, seed: int
) -> list[int]:
    """Continues one prompt; must be called on all ranks together.

    Every stage reads with its own blocks and keeps its own memory, as InfiniTransformer.generate
    does with all blocks. Each data-parallel pipeline generates the same text.

    Args:
        prompt: tokens, at most one segment.
        max_new_tokens: number of tokens to add.
        temperature: 0 means greedy.
        seed: seed for sampling.

    Returns:
        The new tokens.
    """
    engine.module.eval()
    config = engine.module.config
    dtype = next(engine.module.parameters()).dtype
    memory = Memory.empty(config.of_blocks(engine.part.blocks), 1, engine.device, dtype)
    generator = torch.Generator(engine.device).manual_seed(seed)
    tokens = torch.tensor([prompt[-config.segment_length :]], device=engine.device)
    written: list[int] = []
    while len(written) < max_new_tokens:
        hidden, memory = _read(engine, tokens, memory, dtype)
        tokens = torch.zeros(1, 1, dtype=torch.int64, device=engine.device)
        if engine.part.is_last:
            logits = engine.module.logits(hidden[:, -1]).float()
            tokens[:, 0] = sample(logits, Sampling(temperature), generator)
        tokens = engine.from_last(tokens)
        written.append(int(tokens))
    return written


def _read(
    engine: StageEngine, tokens: Tensor, memory: Memory, dtype: torch.dtype
) -> tuple[Tensor, Memory]:
    """Runs tokens [1, t] through this stage, from the previous stage to the next."""
    module = engine.module
    if engine.part.is_first:
        hidden = module.embed(tokens)
    else:
        hidden = engine.receive_hidden((1, tokens.shape[1], module.config.hidden_size), dtype)
    hidden, memory, _ = extend(_WholeBlocks(engine), hidden, memory)
    if not engine.part.is_last:
        engine.send_hidden(hidden)
    return hidden, memory


class _WholeBlocks:
    """A stage's blocks, each with whole weights while it is the current one."""

    def __init__(self, engine: StageEngine):
        self._engine = engine

    def __iter__(self) -> Iterator[Block]:
        for block in self._engine.module.blocks:
            with self._engine.whole(block):
                yield block
