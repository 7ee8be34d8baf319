"""Causal softmax attention inside each segment, with rotary positions."""

from infini_ds.kernels.local_attention.op import local_attention
from infini_ds.kernels.local_attention.rotary import rotate
from infini_ds.kernels.local_attention.sliding import within_reach

__all__ = ["local_attention", "rotate", "within_reach"]
