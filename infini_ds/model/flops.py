"""Counts the layers' floating-point operations, to balance stages and to compute utilisation."""

import torch

from infini_ds.config import ModelConfig
from infini_ds.memory import RULES

PEAK_BF16_FLOPS = {
    "B200": 2250e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12,
    "A100": 312e12, "L40S": 362e12,
}  # fmt: skip
"""Dense bf16 FLOP/s from the vendor's data sheets. Each key is a part of the device's name, and the
first key that matches counts."""


def forward_flops_per_token(config: ModelConfig) -> list[int]:
    """Counts the operations for one token in each layer of `layer_list`, then in the head.

    A multiply-add counts as 2. Attention is causal inside a segment, so a token meets (n + 1) / 2
    keys on average, and n in a sliding window. The memory costs a read (f x d per query head) and a
    write per key-value head, see `MemoryRule.write_flops`. A write gate is a small projection, and
    a short convolution takes a few multiply-adds per channel of queries, keys and values.
    """
    layers = [_block_flops(config.of_layer(layer)) for layer in range(config.num_layers)]
    head = 2 * config.hidden_size * config.vocab_size
    return [0, *layers, 0, head]


def _block_flops(config: ModelConfig) -> int:
    """Counts one layer's operations, see `forward_flops_per_token`."""
    hidden, d, n = config.hidden_size, config.head_dim, config.segment_length
    heads, kv_heads = config.num_heads, config.kv_heads
    projections = 2 * hidden * d * (2 * heads + 2 * kv_heads)
    feed_forward = 2 * hidden * 3 * config.mlp_size
    local = 2 * 2 * heads * d * (2 * n if config.use_sliding_window else n + 1) // 2
    memory = gate = 0
    if config.memory_layers:
        read = 2 * d * RULES[config.memory_rule].feature_size(d)
        memory = _with_norm(config, heads * read + kv_heads * _write(config))
        gate = 2 * hidden * kv_heads if config.memory.write_gate else 0
        gate += 2 * d * kv_heads if config.memory.write_gate_sees_keys else 0
    taps = config.memory.short_conv
    convolution = 2 * (taps + 1) * (heads + 2 * kv_heads) * d if taps else 0
    return projections + feed_forward + local + memory + gate + convolution


def sharing_flops(config: ModelConfig, segments: int, ranks: int, twice: bool) -> int:
    """Counts what a layer computes for a lane, forward, only because ranks share its window.

    That is to find out how the rank's part changes the memory, and what memory the part finds. The
    model's own operations are not included.

    Args:
        config: that of a layer, see `ModelConfig.of_layer`.
        segments: number of segments in the rank's part.
        ranks: number of ranks that share the window.
        twice: whether all writes of the part are summed in PyTorch first, although Triton kernels
            sum them again.
    """
    if not config.memory_layers:
        return 0
    d, rule = config.head_dim, RULES[config.memory_rule]
    maps = rule.map_flops(d, config.segment_length, segments, ranks)
    writes = _with_norm(config, _write(config)) * segments * config.segment_length
    return config.kv_heads * (maps + writes if twice else maps)


def _write(config: ModelConfig) -> int:
    return RULES[config.memory_rule].write_flops(config.head_dim, config.segment_length)


def _with_norm(config: ModelConfig, flops: int) -> int:
    """Adds to products with kv, [d, d], those with the norm, [d], if there is one."""
    return flops + flops // config.head_dim if RULES[config.memory_rule].divides else flops


def training_flops_per_token(config: ModelConfig) -> int:
    """Counts forward and backward as three times the forward pass, without recomputation."""
    return 3 * sum(forward_flops_per_token(config))


def device_peak_flops(device: torch.device, dtype: str) -> float | None:
    """Returns the device's peak FLOP/s in dense matrix products, or None if it is not known."""
    if device.type != "cuda" or dtype != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16_FLOPS.items() if key in name), None)
