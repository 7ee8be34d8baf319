"""The loss: in chunks, over windows, with tied and untied heads."""

import pytest
import torch
import torch.nn.functional as F

from infini_ds.layout import IGNORE_INDEX
from infini_ds.model.head import loss_chunk, token_losses
from infini_ds.model.norm import RMSNorm


@pytest.mark.parametrize("biased", [False, True], ids=["no-bias", "bias"])
def test_chunked_losses_equal_plain_cross_entropy(biased):
    torch.manual_seed(0)
    hidden = torch.randn(2, 13, 8, requires_grad=True)
    weight = torch.randn(30, 8, requires_grad=True)
    bias = torch.randn(30, requires_grad=True) if biased else None
    labels = torch.randint(30, (2, 13))
    labels[0, 3] = labels[1, 12] = IGNORE_INDEX
    leaves = [hidden, weight] + ([bias] if bias is not None else [])
    upstream = torch.randn(2, 13)

    logits = F.linear(hidden, weight, bias)
    expected = F.cross_entropy(logits.mT, labels, reduction="none", ignore_index=IGNORE_INDEX)
    expected_gradients = torch.autograd.grad(expected, leaves, upstream)
    for chunk_tokens in (1, 5, 26, 1000):
        losses = token_losses(hidden, weight, bias, labels, chunk_tokens)
        assert losses.dtype == torch.float32
        assert losses[0, 3] == 0
        torch.testing.assert_close(losses, expected)
        for actual, want in zip(
            torch.autograd.grad(losses, leaves, upstream), expected_gradients, strict=True
        ):
            torch.testing.assert_close(actual, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [5, 1000])
def test_norm_may_be_part_of_the_loss(chunk_tokens):
    torch.manual_seed(0)
    hidden = torch.randn(2, 13, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(8, eps=1e-6).double()
    labels, upstream = torch.randint(30, (2, 13)), torch.randn(2, 13)
    leaves = [hidden, weight, norm.weight]
    within = token_losses(hidden, weight, None, labels, chunk_tokens, norm)
    apart = token_losses(norm(hidden), weight, None, labels, 1000)
    torch.testing.assert_close(within, apart)
    for actual, want in zip(
        torch.autograd.grad(within, leaves, upstream),
        torch.autograd.grad(apart, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(actual, want, rtol=1e-5, atol=1e-5)


def test_logits_exist_for_one_chunk_at_a_time(make_model, make_tokens, monkeypatch):
    rows = []
    linear = F.linear

    def spy(x, weight, bias=None):
        if weight.shape[0] == 61:
            rows.append(x.shape[0])
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", spy)
    make_model().loss(make_tokens(2, 41), chunk_tokens=16).backward()
    assert rows == [16] * 10  # 80 tokens forward, and again in the backward pass


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_loss_equals_cross_entropy_of_logits(make_model, make_tokens, rule, tied):
    model = make_model(memory_rule=rule, tie_embeddings=tied)
    tokens = make_tokens(2, 30)
    labels = tokens[:, 1:].clone()
    labels[:, :4] = IGNORE_INDEX
    expected = F.cross_entropy(model(tokens[:, :-1]).logits.mT, labels)
    torch.testing.assert_close(model.loss(tokens, labels, chunk_tokens=7), expected)


def test_tied_head_is_the_embedding(make_model, make_tokens):
    model = make_model(tie_embeddings=True)
    assert model.head()[0] is model.layers[0].weight
    assert len(model.layers) == model.config.num_layers + 2
    untied = make_model()
    assert untied.head()[0] is not untied.layers[0].weight


def test_backward_over_one_window_equals_loss_backward(make_model, make_tokens, rule, options):
    model, tokens = make_model(memory_rule=rule, **options), make_tokens(2, 30)
    loss = model.loss(tokens)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.testing.assert_close(model.backward(tokens, window_segments=4), loss.detach())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_backward_over_short_windows_has_the_same_loss(make_model, make_tokens, rule, options):
    model, tokens = make_model(memory_rule=rule, **options), make_tokens(2, 30)
    loss = model.loss(tokens).detach()
    torch.testing.assert_close(model.backward(tokens, window_segments=1), loss)


@pytest.mark.parametrize(
    ("asked", "vocab_size", "device", "expected"),
    [
        pytest.param(13, 32_000, "cuda", 13, id="as_asked_for"),
        pytest.param(0, 32_000, "cpu", 1024, id="a_cpu"),
        pytest.param(0, 32_768, "cuda", 8192, id="a_gpu"),
        pytest.param(0, 131_072, "cuda", 2048, id="a_gpu_with_a_large_vocabulary"),
        pytest.param(0, 2**29, "cuda", 1, id="at_least_one"),
    ],
)
def test_a_chunk_of_the_loss_suits_the_device(asked, vocab_size, device, expected):
    assert loss_chunk(asked, vocab_size, device) == expected
