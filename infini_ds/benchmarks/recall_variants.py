"""Defines the variants that `infini-ds bench recall` compares, and the config of each.

This module does not import torch, so that mistakes are reported at once.
"""

from __future__ import annotations

import typing
from typing import Any

from infini_ds import config as configuration
from infini_ds.config import ModelConfig, RunConfig
from infini_ds.config.model import LARGEST_GATE
from infini_ds.config.settings import RESOLVED
from infini_ds.data.recall import vocabulary
from infini_ds.errors import UserError

WHOLE = "full-attention"
"""The variant whose segment is the whole document, as a bound from above."""


def variants() -> list[str]:
    """Returns the names of all variants: every memory rule, and full attention."""
    return [*typing.get_args(ModelConfig.model_fields["memory_rule"].annotation), WHOLE]


def variant_config(config: RunConfig, name: str, seed: int, keys: int, longest: int) -> RunConfig:
    """Returns the config of one run.

    All variants have the config's sizes and options of the memory. Full attention has no write
    gate, because nothing reads its memory.

    Args:
        keys: number of different keys, which gives the vocabulary if the config has none.
        longest: tokens of the longest document in training, the segment of full attention.

    Raises:
        UserError: a rule and the config's options do not go together.
    """
    tree: dict[str, Any] = config.model_dump()
    model, memory = tree["model"], tree["model"]["memory"]
    model["vocab_size"] = model["vocab_size"] or vocabulary(keys)
    if name == WHOLE:
        model.update(segment_length=longest, gate_init=-LARGEST_GATE)
        memory.update(write_gate=False, write_gate_sees_keys=False, write_penalty=0.0)
    else:
        model.update(memory_rule=name)
    steps = tree["train"]["steps"]
    tree["optimizer"]["decay_steps"] = min(tree["optimizer"]["decay_steps"], steps)
    tree["seed"] = seed
    return configuration.parse(tree, f"of {name}", RESOLVED)


def check_config(config: RunConfig, keys: int) -> None:
    """Checks that a config's model can read the task.

    Raises:
        UserError: its vocabulary or its segments are too small.
    """
    size, needed = config.model.vocab_size, vocabulary(keys)
    if size and size < needed:
        raise UserError(
            f"model.vocab_size ({size}) must be 0 or at least {needed}, the tokens of --keys {keys}"
        )
    check_segments("model.segment_length", config.model.segment_length)


def check_segments(name: str, segment_length: int) -> None:
    """Checks that a segment can hold a pair.

    Raises:
        UserError: it is too short.
    """
    if segment_length < 2:
        raise UserError(f"{name} ({segment_length}) must be at least 2, to hold a key and a value")


def check_pairs(name: str, pairs: list[int], keys: int) -> None:
    """Checks numbers of pairs.

    Raises:
        UserError: a document cannot have so many.
    """
    if max(pairs) > keys:
        raise UserError(f"{name} ({max(pairs)}) must each be at most --keys ({keys})")
