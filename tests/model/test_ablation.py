"""Models whose memory is ablated."""

import pytest
import torch

from infini_ds.config.model import LARGEST_GATE
from infini_ds.model.block import memory_ablated

N = 8
"""Tokens of a segment."""


def close_gates(model):
    with torch.no_grad():
        for block in model.blocks:
            block.self_attn.beta.fill_(-LARGEST_GATE)


@torch.no_grad()
def test_segments_are_read_as_if_each_was_alone(make_model, rule, make_tokens):
    model = make_model(memory_rule=rule)
    tokens = make_tokens(2, 5 * N)
    with memory_ablated(model.blocks):
        whole, memory = model.read(tokens, None)
    for place, segment in enumerate(tokens.split(N, dim=1)):
        alone, _ = model.read(segment, None)
        torch.testing.assert_close(whole[:, place * N : (place + 1) * N], alone)
    assert not memory.kv.any()


@torch.no_grad()
def test_all_else_sees_as_far_as_ever(make_model, rule, options, make_tokens):
    """It is what a model with closed gates reads and writes, whatever it has besides a memory."""
    model = make_model(memory_rule=rule, **options).double()
    tokens, prompt = make_tokens(2, 5 * N + 3), make_tokens(1, 3 * N + 5)
    on, _ = model.read(tokens, None)
    with memory_ablated(model.blocks):
        ablated, _ = model.read(tokens, None)
        written = model.generate(prompt, 2 * N, temperature=0)
    assert (ablated[:, N:] - on[:, N:]).abs().max() > 1e-3
    torch.testing.assert_close(model.read(tokens, None)[0], on, rtol=0, atol=0)
    close_gates(model)
    torch.testing.assert_close(ablated, model.read(tokens, None)[0], rtol=1e-9, atol=1e-12)
    assert written.tolist() == model.generate(prompt, 2 * N, temperature=0).tolist()


def test_it_ends_with_an_error_too(make_model):
    model = make_model()
    with pytest.raises(IndexError), memory_ablated(model.blocks):
        model.read(torch.full((1, N), 10**6))
    assert not any(block.self_attn.ablated for block in model.blocks)
