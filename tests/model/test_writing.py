"""What the model learns about writing: gates, their penalty, and the short convolution."""

import pytest
import torch

from infini_ds.layout import Layout
from infini_ds.memory import RULES
from infini_ds.model.layer_state import empty_state
from infini_ds.model.short_conv import ShortConv, identity
from infini_ds.model.transformer import full_layout
from infini_ds.model.write_gate import write_stats

N = 8
TAPS = 4
CPU = torch.device("cpu")
PENALTY = 0.5  # of the tests' models


def conv_with(weight) -> ShortConv:
    """A convolution whose weights are those of the token itself, the one before it and so on."""
    conv = ShortConv(len(weight), len(weight[0]) - 1)
    conv.weight.data = torch.tensor(weight).flip(1)
    return conv


def test_convolution_adds_the_weighted_tokens_before():
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]).view(1, 5, 1, 1)
    conv = conv_with([[10.0, 0.1, 0.01, 0.001, 0.0001]])
    mixed, last = conv(x, torch.zeros(1, TAPS, 1, 1))
    expected = [10.0, 20.1, 40.21, 80.421, 160.8421]
    torch.testing.assert_close(mixed.flatten(), torch.tensor(expected))
    assert last.flatten().tolist() == [2.0, 4.0, 8.0, 16.0]


def test_convolution_has_taps_of_each_channel():
    conv = conv_with(torch.cat((torch.ones(5, 1), torch.eye(5, TAPS)), dim=1).tolist())
    x = torch.randn(2, 6, 5, 1)
    mixed, _ = conv(x, torch.zeros(2, TAPS, 5, 1))
    difference = (mixed - x).flatten(2)
    for channel, back in enumerate((1, 2, 3, 4)):
        torch.testing.assert_close(
            difference[:, back:, channel], x.flatten(2)[:, :-back, channel], rtol=1e-5, atol=1e-5
        )
        assert not difference[:, :back, channel].any()
    assert not difference[..., 4].any()


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_convolution_in_two_pieces_equals_one(cut):
    torch.manual_seed(0)
    conv = conv_with(torch.randn(6, TAPS + 1).tolist())
    x, nothing = torch.randn(2, 7, 3, 2), torch.zeros(2, TAPS, 3, 2)
    whole, end = conv(x, nothing)
    first, last = conv(x[:, :cut], nothing)
    second, last = conv(x[:, cut:], last)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    assert torch.equal(last, end)


def test_convolution_sees_the_tokens_before_the_segment_and_the_window(make_model, make_tokens):
    """Where local attention cannot, and where no document begins."""
    taps = 3
    model = make_model(num_layers=1, memory={"short_conv": taps})
    model.blocks[0].self_attn.beta.data.fill_(-100)  # nothing is read from the memory
    tokens = make_tokens(1, 4 * N)
    starts = torch.tensor([[True, False, True]])
    layout = Layout(starts, torch.full((1, 3), N, dtype=torch.int32))
    memory = [state.map(torch.rand_like) for state in [empty_state(model.config, 1)]]

    def first_rows(tokens: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            window, after, _ = model.read_window(tokens[:, : 3 * N], layout, memory)
            rest, _, _ = model.read_window(tokens[:, 3 * N :], full_layout(1, 1, N, CPU), after)
        return list(torch.cat((window, rest), dim=1)[0, ::N])

    before = first_rows(tokens)
    for back in range(1, N + 1):
        changed = tokens.clone()
        for segment in (1, 2, 3):
            changed[0, segment * N - back] += 1
        changed %= model.config.vocab_size
        same = [torch.equal(a, b) for a, b in zip(before, first_rows(changed), strict=True)]
        if back == N:  # the segments' own first tokens
            assert not any(same[1:3])
        else:
            assert same == [True, back > taps, True, back > taps]


def test_options_that_do_nothing_change_nothing_but_the_share_that_is_written(
    make_model, make_tokens, rule
):
    """With zero weights every gate is one half, and a read may divide by what was written. Where it
    does not, all is written."""
    share = 0.5 if RULES[rule].divides else 1.0
    plain = make_model(memory_rule=rule)
    other = make_model(memory_rule=rule, memory={"write_gate": True, "short_conv": True})
    other.load_state_dict(plain.state_dict(), strict=False)
    for name, parameter in other.named_parameters():
        if "write_gate" in name:
            parameter.data.fill_(3 if share == 1 and name.endswith("write_gate.bias") else 0)
        if "short_conv" in name:
            parameter.data.copy_(identity(len(parameter), TAPS))
    tokens = make_tokens(2, 2 * N)
    with torch.no_grad():
        expected, actual = plain(tokens), other(tokens)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.memory.norm, expected.memory.norm * share)


def window_of(make_tokens):
    tokens = make_tokens(2, 3 * N)
    lengths = torch.tensor([[N, 3, N], [5, N, 0]], dtype=torch.int32)
    layout = Layout(torch.tensor([[True, False, True], [True, True, False]]), lengths)
    return tokens, layout


def seen_gates(model) -> list[torch.Tensor]:
    """A list to which each layer that is called adds its write weights, [batch, segments, n,
    kv_heads]."""
    seen = []

    def watch(gate) -> None:
        weights = gate.weights

        def watched(*args) -> torch.Tensor:
            seen.append(weights(*args))
            return seen[-1]

        gate.weights = watched

    for block in model.blocks:
        watch(block.self_attn.write_gate)
    return seen


def gates_of(model, tokens, layout):
    """Write weights of each layer [batch, length, kv_heads], and the layers' statistics."""
    seen = seen_gates(model)
    memory = [RULES[model.config.memory_rule].empty(2, 2, 8)] * 2
    _, _, stats = model.read_window(tokens, layout, memory)
    return [w.flatten(1, 2) for w in seen], stats


def test_statistics_count_valid_tokens_alone(make_model, make_tokens, rule):
    model = make_model(memory_rule=rule, memory={"write_gate": True})
    tokens, layout = window_of(make_tokens)
    gates, stats = gates_of(model, tokens, layout)
    valid = (torch.arange(N) < layout.lengths[..., None]).flatten(1)
    assert len(gates) == len(stats) == 2
    for w, layer in zip(gates, stats, strict=True):
        assert layer.mass.item() == pytest.approx(w[valid].sum().item(), rel=1e-6)
        assert layer.zeros.item() == (w[valid] == 0).sum().item() > 0
        assert layer.mass.requires_grad
        assert not layer.zeros.requires_grad


@pytest.mark.parametrize("sees_keys", [False, True])
def test_gate_sees_the_token_before_through_the_key(make_model, make_tokens, rule, sees_keys):
    settings = {"write_gate": True, "write_gate_sees_keys": sees_keys, "short_conv": 2}
    model = make_model(memory_rule=rule, num_layers=1, memory=settings)
    for parameter in model.blocks[0].self_attn.write_gate.parameters():
        parameter.data.mul_(0.01)  # no write weight is at its limits
    tokens = make_tokens(1, N)
    other = tokens.clone()
    other[0, 2] = (other[0, 2] + 1) % model.config.vocab_size
    seen = seen_gates(model)
    with torch.no_grad():
        model(tokens), model(other)
    changed = (seen[0] != seen[1]).any(dim=-1).flatten()
    reached = range(2, 5) if sees_keys else [2]
    assert changed.nonzero().flatten().tolist() == list(reached)


def test_write_weights_are_those_of_the_equation(make_model):
    gate = make_model(memory={"write_gate": True, "write_gate_sees_keys": True}).blocks[0]
    gate = gate.self_attn.write_gate.double()
    x, k = torch.randn(3, 5, 32).double(), torch.randn(3, 5, 2, 8).double()
    for head in range(2):
        logits = x @ gate.weight[head] + k[..., head, :] @ gate.key_weight[head] + gate.bias[head]
        expected = (logits / 6 + 0.5).clamp(0, 1)
        torch.testing.assert_close(
            gate.weights(gate(x), k)[..., head].double(), expected, rtol=1e-5, atol=1e-6
        )


def test_padding_has_no_gradient_from_the_penalty():
    w = torch.rand(2, 5, 3, requires_grad=True)
    valid = torch.rand(2, 5) < 0.5
    (gradient,) = torch.autograd.grad(write_stats(w, valid).mass, w)
    assert torch.equal(gradient, valid[..., None].expand_as(w).float())


def test_model_without_gates_has_no_statistics(make_model, make_tokens):
    tokens, layout = window_of(make_tokens)
    memory = [RULES["linear"].empty(2, 2, 8)] * 2
    _, _, stats = make_model().read_window(tokens, layout, memory)
    assert stats == []


def test_zero_gates_write_nothing(make_model, make_tokens, rule):
    model = make_model(memory_rule=rule, memory={"write_gate": True})
    for block in model.blocks:
        block.self_attn.write_gate.bias.data.fill_(-100)
    tokens = make_tokens(1, 2 * N)
    with torch.no_grad():
        whole, second = model(tokens), model(tokens[:, N:])
    assert not whole.memory.norm.any()
    assert torch.equal(whole.logits[:, N:], second.logits)


@pytest.mark.parametrize("length", [3 * N + 1, 3 * N + 6])
def test_loss_has_the_penalty_of_mean_write_weights(make_model, make_tokens, rule, length):
    settings = {"write_gate": True, "short_conv": True}
    penalised = make_model(memory_rule=rule, memory=settings | {"write_penalty": PENALTY})
    free = make_model(memory_rule=rule, memory=settings)
    tokens, seen = make_tokens(2, length), seen_gates(free)
    expected = free.loss(tokens)
    mass = torch.stack([w.sum() for w in seen]).sum()
    means = mass / (2 * (length - 1) * 2)  # of 2 rows and 2 key-value heads
    torch.testing.assert_close(penalised.loss(tokens), expected + PENALTY * means)
    gradient, free_gradient = (
        torch.autograd.grad(loss, list(model.parameters()))
        for loss, model in ((penalised.loss(tokens), penalised), (expected + PENALTY * means, free))
    )
    for one, other in zip(gradient, free_gradient, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_gates_have_a_gradient_even_if_nothing_is_read(make_model, make_tokens):
    model = make_model(memory={"write_gate": True})
    model.loss(make_tokens(1, 5)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
