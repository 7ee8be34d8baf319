"""The FLOPs formula against PyTorch's counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from infini_ds.model.flops import forward_flops_per_token, training_flops_per_token


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_formula_equals_counted_products(make_model, make_tokens, rule, options, kv_heads):
    n = 64
    model = make_model(
        memory_rule=rule, num_kv_heads=kv_heads, head_dim=16, segment_length=n, hidden_size=64,
        **options,
    )  # fmt: skip
    config = model.config
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(make_tokens(2, 4 * n))
    products = {
        str(operation): count
        for operation, count in counter.get_flop_counts()["Global"].items()
        if "attention" not in str(operation)
    }
    counted = sum(products.values()) / (2 * 4 * n)
    met = 2 * n if config.use_sliding_window else n + 1
    local = 2 * 2 * config.num_heads * config.head_dim * met // 2 * config.num_layers
    expected = sum(forward_flops_per_token(config)) - local
    if config.memory.short_conv:  # not a product of matrices: a multiply-add a tap and channel
        channels = (config.num_heads + 2 * config.kv_heads) * config.head_dim
        expected -= 2 * (config.memory.short_conv + 1) * channels * config.num_layers
    # Beyond the formula: the scan over segments or the walk, and the guard of the delta rule.
    assert expected <= counted <= expected * (1.15 if rule == "delta" else 1.05)


def test_local_attention_counts_half_of_the_scores(make_model):
    short, long = (
        sum(forward_flops_per_token(make_model(segment_length=n).config)) for n in (8, 16)
    )
    assert long - short == 2 * (2 * 2 * 4 * 8 * 8 // 2)  # 2 layers, 4 heads of 8, 8 / 2 keys more


def test_training_is_three_forwards(make_model):
    config = make_model().config
    assert training_flops_per_token(config) == 3 * sum(forward_flops_per_token(config))
