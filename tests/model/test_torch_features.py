"""What people do with PyTorch modules: other types, autocast, compilation."""

import pytest
import torch

from infini_ds.kernels.infini_attention import Inputs, infini_attention
from infini_ds.layout import Layout
from infini_ds.memory import RULES
from infini_ds.model.block import Block
from tests.model.conftest import MODEL

N = 8


@pytest.mark.parametrize("length", [2 * N, 2 * N + 3])
def test_autocast_reads_and_trains(make_model, make_tokens, options, length):
    model, tokens = make_model(**options), make_tokens(2, length + 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens)
        text = model.generate(tokens, 3, temperature=0)
    loss.backward()
    assert loss.item() == pytest.approx(model.loss(tokens).item(), rel=0.02)
    assert text.shape == (2, 3)


@pytest.mark.parametrize("written", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("read", [torch.float32, torch.bfloat16])
def test_a_memory_goes_on_in_a_model_of_another_type(
    make_model, make_tokens, options, written, read
):
    tokens = make_tokens(1, 2 * N + 5)
    memory = make_model(**options).to(written)(tokens[:, :-4]).memory
    out = make_model(**options).to(read)(tokens[:, -4:], memory=memory)
    assert out.memory.keys.dtype == read
    assert out.memory.kv.dtype == out.memory.norm.dtype == torch.float32
    whole = make_model(**options)(tokens).logits[:, -4:]
    torch.testing.assert_close(out.logits.float(), whole, rtol=0.2, atol=0.3)


def test_memory_of_another_type_keeps_fp32_where_it_is_compressed(make_model, make_tokens):
    memory = make_model()(make_tokens(1, N + 1)).memory.to(dtype=torch.bfloat16)
    assert memory.kv.dtype == memory.norm.dtype == memory.weights.dtype == torch.float32
    assert memory.keys.dtype == memory.values.dtype == memory.tail.dtype == torch.bfloat16


def test_a_memory_is_shown_in_a_line(make_model, make_tokens):
    shown = repr(make_model()(make_tokens(2, N + 3)).memory)
    assert shown == (
        "Memory(2 layers, 2 documents, 2 key-value heads of 8, open segments of [3, 3] tokens, "
        "torch.float32, cpu)"
    )


def test_compiled_for_any_length_it_is_the_same(make_model, make_tokens):
    model = make_model(num_layers=1)
    compiled = torch.compile(model)
    for length in (3 * N, 2 * N, 2 * N + 5, N + 1):
        tokens = make_tokens(1, length)
        torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)


def test_loss_goes_on_after_a_memory(make_model, make_tokens, options):
    model, tokens = make_model(**options), make_tokens(2, 4 * N + 4)
    memory = model(tokens[:, : 2 * N + 3]).memory
    rest = tokens[:, 2 * N + 3 :]
    losses = [model.loss(rest, memory=memory), model.backward(rest, 1, memory=memory)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    if "memory" not in options:
        logits = model(rest[:, :-1], memory=memory).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rest[:, 1:].flatten())
        assert losses[0].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: m(t[0]), r"tokens must be \[batch, length\], have shape \(20,\)"),
        (lambda m, t: m.loss(t[0]), r"tokens must be \[batch, length\] of at least 2, have"),
        (lambda m, t: m.loss(t[:, :1]), r"tokens must be \[batch, length\] of at least 2, have"),
        (lambda m, t: m.loss(t, t), r"labels must be \[batch, length - 1\] = \[2, 19\]"),
        (lambda m, t: m.backward(t, 1, t), r"labels must be \[batch, length - 1\] = \[2, 19\]"),
        (lambda m, t: m.backward(t, 0), r"window_segments \(0\) must be at least 1"),
        (lambda m, t: m.generate(t, 0), r"max_new_tokens \(0\) must be at least 1"),
        (lambda m, t: m.generate(t, 1, top_p=0.0), r"top_p \(0.0\) must be in \(0, 1\]"),
    ],
)
def test_what_does_not_fit_is_said(make_model, make_tokens, call, message):
    with pytest.raises(ValueError, match=message):
        call(make_model(), make_tokens(2, 20))


@pytest.mark.parametrize("settings", [{"temperature": 1e-320}, {"top_p": 1e-300}])
def test_the_smallest_numbers_sample_the_likeliest(make_model, make_tokens, settings):
    model, tokens = make_model(), make_tokens(2, 5)
    greedy = model.generate(tokens, 6, temperature=0)
    assert torch.equal(model.generate(tokens, 6, **settings), greedy)


def test_names_of_choices_are_checked():
    with pytest.raises(ValueError, match=r"activation_checkpointing \(all\) must be one of none"):
        Block(MODEL, "all")  # type: ignore[arg-type]
    q = torch.zeros(1, 1, N, 2, 8)
    layout = Layout(torch.ones(1, 1, dtype=torch.bool), torch.full((1, 1), N, dtype=torch.int32))
    rotary = torch.ones(N, 4), torch.zeros(N, 4)
    memory = RULES["linear"].empty(1, 2, 8)
    inputs = Inputs(q, q, q, None, memory, layout, torch.zeros(2), "sum", rotary)
    with pytest.raises(ValueError, match=r"rule \(sum\) must be one of linear, delta"):
        infini_attention(inputs)
