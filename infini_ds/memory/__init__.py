"""The compressive memory, a state passed on along a document, and the rules that change it."""

from infini_ds.memory.delta import Delta
from infini_ds.memory.gated_delta import GatedDelta, GatedDeltaDPFP
from infini_ds.memory.linear import Linear
from infini_ds.memory.rule import MemoryRule
from infini_ds.memory.state import MemoryState

RULES: dict[str, MemoryRule] = {
    rule.name: rule for rule in (Linear(), Delta(), GatedDelta(), GatedDeltaDPFP())
}
"""The memory rules by their names in model.memory_rule."""

__all__ = ["RULES", "MemoryRule", "MemoryState"]
