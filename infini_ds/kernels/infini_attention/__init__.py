"""Infini-attention over a window of segments."""

from infini_ds.kernels.infini_attention.op import infini_attention
from infini_ds.kernels.infini_attention.reference import Inputs

__all__ = ["Inputs", "infini_attention"]
