"""Causal softmax attention inside each segment, with rotary positions."""

from infini_ds.kernels.local_attention.op import local_attention
from infini_ds.kernels.local_attention.rotary import rotate

__all__ = ["local_attention", "rotate"]
