"""What is computed again in the backward pass has the same gradients."""

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["block", "attention"])
def test_gradients_are_identical(make_model, make_tokens, rule, options, checkpointing, dtype):
    tokens = make_tokens(2, 33)
    gradients = []
    for choice in ("none", checkpointing):
        model = make_model(choice, memory_rule=rule, memory=options).to(dtype).train()
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
