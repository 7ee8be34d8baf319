"""What `infini-ds bench quality` compares: a line each.

The names are part of the help, which must not wait for pydantic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from infini_ds.config import MemoryConfig, RunConfig

WRITE_PENALTY = 0.01
"""Of a variant with a write gate, where the config has no model.memory.write_penalty."""


class Variant(NamedTuple):
    """How a variant differs from the linear memory."""

    changes: Callable[[RunConfig], dict[str, Any]]
    """Settings of the model that are not the linear memory's, given the config."""
    memory: bool = True
    """False: every segment starts empty, in training and in evaluation."""


VARIANTS = {
    "segments-only": Variant(lambda _: {}, memory=False),
    "linear": Variant(lambda _: {}),
    "delta": Variant(lambda _: {"memory_rule": "delta"}),
    "linear-write-gate": Variant(lambda config: {"memory": _write_gate(config)}),
    # What a Transformer of the window's length does.
    "full-attention": Variant(lambda config: {"segment_length": _window(config)}, memory=False),
}


def variant_config(config: RunConfig, name: str, seed: int) -> RunConfig:
    """The config of one run: all variants read as many positions in a step."""
    from infini_ds.config import MemoryConfig

    linear = {"memory_rule": "linear", "memory": MemoryConfig()}
    changes = linear | VARIANTS[name].changes(config)
    model = config.model.model_copy(update=changes)
    segments = _window(config) // model.segment_length
    train = config.train.model_copy(update={"window_segments": segments})
    # Packing would give each variant its own order of documents, as segments differ in length.
    data = config.data.model_copy(update={"packing": False})
    return config.model_copy(update={"model": model, "data": data, "train": train, "seed": seed})


def _window(config: RunConfig) -> int:
    return config.train.window_segments * config.model.segment_length


def _write_gate(config: RunConfig) -> MemoryConfig:
    from infini_ds.config import MemoryConfig

    penalty = config.model.memory.write_penalty or WRITE_PENALTY
    return MemoryConfig(write_gate=True, write_penalty=penalty)
