"""Floating-point operations of the layers: for balancing stages and for utilisation."""

from infini_ds.config import ModelConfig
from infini_ds.model.short_conv import TAPS


def forward_flops_per_token(config: ModelConfig) -> list[int]:
    """Of each layer of `layer_list` plus the head, for one token; a multiply-add counts as 2.

    Attention is causal inside a segment: a token meets (n + 1) / 2 keys on average. The memory
    costs a read (d x d per query head) and a write (d x d per key-value head), and the delta
    rule one more read per key-value head. A write gate is a small projection, a short convolution
    a few multiply-adds per channel of queries, keys and values.
    """
    hidden, d, n = config.hidden_size, config.head_dim, config.segment_length
    heads, kv_heads = config.num_heads, config.kv_heads
    projections = 2 * hidden * d * (2 * heads + 2 * kv_heads)
    feed_forward = 2 * hidden * 3 * config.mlp_size
    local = 2 * 2 * heads * d * (n + 1) // 2
    accesses = heads + kv_heads * (2 if config.memory_rule == "delta" else 1)
    memory = 2 * d * (d + 1) * accesses
    gate = 2 * hidden * kv_heads if config.memory.write_gate else 0
    convolution = 2 * TAPS * (heads + 2 * kv_heads) * d if config.memory.short_conv else 0
    block = projections + feed_forward + local + memory + gate + convolution
    head = 2 * hidden * config.vocab_size
    return [0, *[block] * config.num_layers, 0, head]


def training_flops_per_token(config: ModelConfig) -> int:
    """Forward and backward, without what is computed again: three times the forward."""
    return 3 * sum(forward_flops_per_token(config))
