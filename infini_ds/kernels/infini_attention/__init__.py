"""Infini-attention over a window of segments."""

from infini_ds.kernels.infini_attention.op import infini_attention

__all__ = ["infini_attention"]
