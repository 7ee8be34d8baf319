"""Infini-attention by Triton kernels."""
