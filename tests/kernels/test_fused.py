"""Compiled chains of operators against the same in PyTorch: by TorchInductor, here for a CPU."""

import pytest
import torch

from infini_ds.kernels import backend, fused
from infini_ds.layout import IGNORE_INDEX
from infini_ds.model.feed_forward import gated, gated_gradient
from infini_ds.model.head import cross_entropy, token_losses


@pytest.fixture
def compiling(monkeypatch):
    """Called, all is compiled as on a GPU."""
    yield lambda: monkeypatch.setattr(fused, "compiles", lambda x: True)
    torch._dynamo.reset()


def computed(function, x, *others):
    """Result, gradient of x, and how many numbers were kept for it."""
    leaf = x.clone().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = function(leaf, *others)
    torch.manual_seed(1)
    (gradient,) = torch.autograd.grad(out, leaf, torch.randn_like(out))
    return out, gradient, sum(t.numel() for t in kept)


@pytest.mark.parametrize("hidden_act", ["silu", "gelu"])
def test_gated_and_its_gradient_are_the_same_compiled(compiling, hidden_act):
    torch.manual_seed(0)
    x, gradient = torch.randn(2, 24, 64), torch.randn(2, 24, 32)
    plain = gated(x, hidden_act), gated_gradient(gradient, x, hidden_act)
    compiling()
    torch.testing.assert_close(gated(x, hidden_act), plain[0])
    torch.testing.assert_close(gated_gradient(gradient, x, hidden_act), plain[1])


def test_cross_entropy_is_the_same_compiled(compiling):
    torch.manual_seed(0)
    logits, targets = 4 * torch.randn(24, 50), torch.randint(50, (24,))
    targets[3] = IGNORE_INDEX
    plain, plain_gradient, _ = computed(cross_entropy, logits, targets)
    compiling()
    out, gradient, kept = computed(cross_entropy, logits, targets)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(gradient, plain_gradient)
    assert out[3] == 0
    assert kept <= logits.numel() + 3 * len(targets)


def test_compiled_loss_is_computed_again_in_chunks(compiling):
    compiling()
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 20, 8), torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(50, (1, 20))
    losses = [token_losses(hidden, weight, None, labels, chunk) for chunk in (8, 20)]
    gradients = [torch.autograd.grad(loss.sum(), weight)[0] for loss in losses]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def test_nothing_is_compiled_on_a_cpu():
    assert not backend.compiles(torch.zeros(1))
