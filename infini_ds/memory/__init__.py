"""The compressive memory: the state that is handed on along a document, and how it changes."""

from infini_ds.memory.delta import Delta
from infini_ds.memory.linear import Linear
from infini_ds.memory.rule import MemoryRule
from infini_ds.memory.state import MemoryState

RULES: dict[str, MemoryRule] = {rule.name: rule for rule in (Linear(), Delta())}
"""By their names in model.memory_rule."""

__all__ = ["RULES", "MemoryRule", "MemoryState"]
