"""The feed-forward against plain operators in fp64: results, gradients, and what is kept."""

import pytest
import torch
import torch.nn.functional as F

from infini_ds.model.feed_forward import FeedForward
from tests import tiny

LIMITS = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


def make(**options) -> FeedForward:
    torch.manual_seed(0)
    layer = FeedForward(tiny.model_config(hidden_size=24, intermediate_size=40, **options))
    for parameter in layer.parameters():
        parameter.data.copy_(parameter.detach().bfloat16())
    return layer


def plain(layer: FeedForward, hidden: torch.Tensor) -> torch.Tensor:
    gate, up = layer.gate_up_proj(hidden).chunk(2, dim=-1)
    return layer.down_proj({"silu": F.silu, "gelu": F.gelu}[layer.hidden_act](gate) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("hidden_act", ["silu", "gelu"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_feed_forward_is_plain_operators(bias, hidden_act, dtype):
    layer = make(hidden_act=hidden_act, mlp_bias=bias)
    hidden, upstream = (torch.randn(2, 7, 24).bfloat16() for _ in range(2))
    results = []
    for function, kind in ((plain, torch.float64), (FeedForward.forward, dtype)):
        own = layer.to(kind)
        leaf = hidden.to(kind).requires_grad_()
        out = function(own, leaf)
        gradients = torch.autograd.grad(out, (leaf, *own.parameters()), upstream.to(kind))
        results.append((out, *gradients))
    for want, have in zip(*results, strict=True):
        assert have.dtype == dtype
        assert (have.double() - want).norm() <= LIMITS[dtype] * want.norm()


def test_feed_forward_keeps_its_input_gate_and_up():
    layer, hidden = make(), torch.randn(2, 7, 24, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(hidden)
    weights = {parameter.data_ptr() for parameter in layer.parameters()}
    assert sum(t.numel() for t in kept if t.data_ptr() not in weights) == 2 * 7 * (24 + 2 * 40)


def test_frozen_weights_get_no_gradient():
    layer, hidden = make(mlp_bias=True).requires_grad_(False), torch.randn(1, 3, 24)
    hidden.requires_grad_()
    layer(hidden).sum().backward()
    assert hidden.grad is not None
    assert all(parameter.grad is None for parameter in layer.parameters())
