"""Assigns blocks to stages by estimated FLOPs."""

import itertools
from functools import cache, lru_cache

from infini_ds.config import ModelConfig
from infini_ds.model.flops import forward_flops_per_token


def balance(config: ModelConfig, stages: int) -> list[int]:
    """Returns the first block of each stage, followed by the number of blocks.

    Stage s has the blocks bounds[s] up to, but not including, bounds[s+1].

    The load of the most loaded stage is minimal. Every stage has at least one block, and the last
    one also has the head. Among equal choices, earlier stages get more blocks, because the last one
    also computes the loss.
    """
    _, *blocks, _, head = forward_flops_per_token(config)
    return list(_bounds(tuple(blocks), head, stages))


@lru_cache(maxsize=64)  # a plan asks for the same ones for each number of chunks
def _bounds(blocks: tuple[int, ...], head: int, stages: int) -> tuple[int, ...]:
    """The bounds of `balance`, by the cost of each block and of the head."""
    before = list(itertools.accumulate(blocks, initial=0))

    @cache
    def best(stage: int, first: int) -> tuple[int, tuple[int, ...]]:
        """Returns the highest load among the stages from this one on, and where each ends."""
        if stage == stages - 1:
            return before[-1] - before[first] + head, (len(blocks),)
        choices = []
        for end in range(len(blocks) - (stages - stage - 1), first, -1):
            load, ends = best(stage + 1, end)
            choices.append((max(load, before[end] - before[first]), (end, *ends)))
        return min(choices, key=lambda choice: choice[0])

    return 0, *best(0, 0)[1]


def describe(config: ModelConfig, bounds: list[int]) -> str:
    """Describes the choice in one line, with each stage's share of the FLOPs."""
    flops = forward_flops_per_token(config)
    total = sum(flops)
    parts = []
    for stage, (first, end) in enumerate(itertools.pairwise(bounds)):
        load = sum(flops[1 + first : 1 + end])
        names = [f"blocks {first}-{end - 1}" if end - first > 1 else f"block {first}"]
        if stage == 0:
            names.insert(0, "embedding")
        if stage == len(bounds) - 2:
            load += flops[-1]
            names.append("head")
        parts.append(f"stage {stage}: {' + '.join(names)} ({load / total:.0%} of FLOPs)")
    return "; ".join(parts)
