"""Norms of queries and keys, one definition for local attention and the memory."""

import pytest
import torch

from tests.model.conftest import WRITING

N = 8
LENGTH = 3 * N + 5


@pytest.fixture
def model(make_model):
    """Norms whose weights differ, and all else that changes queries and keys."""
    model = make_model(memory_rule="delta", memory=WRITING, qk_norm=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                assert torch.equal(parameter, torch.ones(8))
                parameter.uniform_(0.2, 2.0, generator=generator)
    return model


@torch.no_grad()
def test_scale_of_projected_queries_and_keys_does_not_matter(model, make_tokens):
    tokens = make_tokens(2, LENGTH)
    before = model(tokens)
    heads, kv_heads, d = 4, 2, 8
    for block in model.layers[1:3]:
        weight = block.self_attn.qkv_proj.weight
        weight[: heads * d] *= 5
        weight[heads * d : (heads + kv_heads) * d] *= 3
    after = model(tokens)
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after.memory.norm, before.memory.norm, rtol=1e-3, atol=1e-3)
    model.layers[1].self_attn.k_norm.weight.mul_(2)
    assert not torch.allclose(model(tokens).memory.norm, before.memory.norm, rtol=1e-2)


@torch.no_grad()
def test_reading_token_by_token_equals_one_call(model, make_tokens):
    tokens = make_tokens(2, LENGTH)
    memory, logits = None, []
    for token in tokens.split(1, dim=1):
        out = model(token, memory=memory)
        memory = out.memory
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_changed_token_changes_no_earlier_output(model, make_tokens):
    tokens, place = make_tokens(1, LENGTH), 13
    before = model(tokens).logits
    tokens[0, place] = (tokens[0, place] + 1) % 61
    after = model(tokens).logits
    torch.testing.assert_close(before[:, :place], after[:, :place], rtol=1e-6, atol=1e-6)
    assert ((before - after).abs().amax(-1)[0] > 1e-6)[place:].all()
