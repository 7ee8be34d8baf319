"""Chooses how Infini-attention is computed."""

from infini_ds.kernels.infini_attention.parallel import infini_attention_parallel

infini_attention = infini_attention_parallel
