"""What is computed again in the backward pass has the same gradients."""

import pytest
import torch

from infini_ds.model.layer_state import empty_state
from infini_ds.model.transformer import full_layout

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["block", "attention"])
def test_gradients_are_identical(make_model, make_tokens, rule, options, checkpointing, dtype):
    tokens = make_tokens(2, 33)
    gradients = []
    for choice in ("none", checkpointing):
        model = make_model(choice, memory_rule=rule, **options).to(dtype).train()
        model.loss(tokens).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name


def test_nothing_is_computed_again_in_evaluation(make_model, make_tokens):
    model = make_model("block").eval()
    calls = []
    model.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    model.loss(make_tokens(1, 17)).backward()
    assert len(calls) == 1


@pytest.mark.parametrize("checkpointing", ["none", "attention", "block"])
def test_first_block_may_read_tokens(make_model, make_tokens, checkpointing):
    """With its embedding it is the same function, and keeps tokens alone if computed again."""
    model = make_model(checkpointing).train()
    embedding, block = model.layers[0], model.blocks[0]
    tokens = make_tokens(2, 16)
    layout = full_layout(2, 16 // model.config.segment_length, model.config.segment_length, CPU)
    memory = empty_state(model.config, 2)
    kept = set()
    results = []
    for inputs, before in ((embedding(tokens), None), (tokens, embedding)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.add((x.shape, x.dtype)) or x, lambda x: x
        ):
            hidden, after, _ = block(inputs, layout, memory, None, before)
        model.zero_grad()
        (hidden.square().sum() + after.kv.square().sum()).backward()
        results.append([hidden, *after, *(p.grad for p in (*block.parameters(), embedding.weight))])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    hidden_is_kept = (hidden.shape, hidden.dtype) in kept
    assert hidden_is_kept == (checkpointing != "block")
