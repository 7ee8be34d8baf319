"""Generates text through the stages without gathering the model anywhere."""

from typing import Protocol

import torch
from torch import Tensor

from infini_ds.model.decoding import extend
from infini_ds.model.generation import Sampling, sample
from infini_ds.model.memory import Memory
from infini_ds.parallel.part import Part
from infini_ds.parallel.pipeline.module import InfiniPipeline


class Stage(Protocol):
    """The members of a stage's engine that generation needs."""

    module: InfiniPipeline
    device: torch.device
    part: Part

    def from_last(self, value: Tensor) -> Tensor: ...

    def send_hidden(self, hidden: Tensor) -> None: ...

    def receive_hidden(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...


@torch.no_grad()
def generate(
    engine: Stage, prompt: list[int], max_new_tokens: int, temperature: float, seed: int
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
    own = config.model_copy(update={"num_layers": len(engine.part.blocks)})
    dtype = next(engine.module.parameters()).dtype
    memory = Memory.empty(own, 1, engine.device, dtype)
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
    engine: Stage, tokens: Tensor, memory: Memory, dtype: torch.dtype
) -> tuple[Tensor, Memory]:
    """Runs tokens [1, t] through this stage, from the previous stage to the next."""
    module = engine.module
    if engine.part.is_first:
        hidden = torch.nn.functional.embedding(tokens, module.embedding)
    else:
        hidden = engine.receive_hidden((1, tokens.shape[1], module.config.hidden_size), dtype)
    hidden, memory, _ = extend(module.blocks, hidden, memory)
    if engine.part.is_last:
        hidden = module.final_norm(hidden)
    else:
        engine.send_hidden(hidden)
    return hidden, memory
