"""Infini-attention over a window of segments."""

from infini_ds.kernels.infini_attention.op import infini_attention
from infini_ds.memory.state import LayerMemory

__all__ = ["LayerMemory", "infini_attention"]
