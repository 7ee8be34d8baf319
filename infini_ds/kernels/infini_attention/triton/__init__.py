"""Infini-attention with Triton kernels."""
