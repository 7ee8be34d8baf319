"""Defines the variants that `infini-ds bench quality` compares, one per line.

Their names are part of the help, which must not wait for pydantic to load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from infini_ds.config import MemoryConfig, RunConfig

WRITE_PENALTY = 0.01
"""Penalty of a variant with a write gate if the config has no model.memory.write_penalty."""


class Variant(NamedTuple):
    """The difference between a variant and the linear memory."""

    changes: Callable[[RunConfig], dict[str, Any]]
    """Takes the config and returns the model's settings that differ from the linear memory's."""
    memory: bool = True
    """Whether it has a memory, so that this can be ablated."""
    connected: bool = True
    """If False, every segment is read as if a document began, in training and in evaluation."""


VARIANTS = {
    "segments-only": Variant(lambda _: {}, memory=False, connected=False),
    "sliding-window": Variant(lambda _: {"use_sliding_window": True}, memory=False),
    "linear": Variant(lambda _: {}),
    "delta": Variant(lambda _: {"memory_rule": "delta"}),
    "linear-write-gate": Variant(lambda config: {"memory": _write_gate(config)}),
    "gated_delta": Variant(
        lambda config: {"memory_rule": "gated_delta", "memory": _write_gate(config)}
    ),
    "gated_delta-sliding-window": Variant(lambda config: _beside_window(config, "gated_delta")),
    "gated_delta_dpfp-sliding-window": Variant(
        lambda config: _beside_window(config, "gated_delta_dpfp")
    ),
    # A Transformer whose context is the window.
    "full-attention": Variant(
        lambda config: {"segment_length": _window(config)}, memory=False, connected=False
    ),
}


def variant_config(config: RunConfig, name: str, seed: int) -> RunConfig:
    """Returns the config of one run; all variants read the same number of positions per step.

    Those with a memory have it in the layers that model.memory.layers says.
    """
    from infini_ds.config import MemoryConfig

    own = config.model.memory
    layers = own.layers if VARIANTS[name].memory else ()
    memory = MemoryConfig(layers=layers, short_conv=own.short_conv)
    linear = {"memory_rule": "linear", "memory": memory, "use_sliding_window": False}
    changes = linear | VARIANTS[name].changes(config)
    model = config.model.model_copy(update=changes)
    segments = _window(config) // model.segment_length
    train = config.train.model_copy(update={"window_segments": segments})
    # Packing would give each variant its own order of documents, as segments differ in length.
    data = config.data.model_copy(update={"packing": False})
    return config.model_copy(update={"model": model, "data": data, "train": train, "seed": seed})


def _window(config: RunConfig) -> int:
    return config.train.window_segments * config.model.segment_length


def _beside_window(config: RunConfig, rule: str) -> dict[str, Any]:
    return {"memory_rule": rule, "memory": _write_gate(config), "use_sliding_window": True}


def _write_gate(config: RunConfig) -> MemoryConfig:
    memory = config.model.memory
    penalty = memory.write_penalty or WRITE_PENALTY
    return memory.model_copy(update={"write_gate": True, "write_penalty": penalty})
