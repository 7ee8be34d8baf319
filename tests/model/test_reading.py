"""Reading in pieces equals reading at once, wherever it is cut."""

import pytest
import torch

from infini_ds.model.memory import Memory

N = 8
LENGTH = 3 * N + 5


def assert_same_memory(actual: Memory, expected: Memory) -> None:
    """Equal up to rounding, in everything that is used of it."""
    assert actual.lengths == expected.lengths
    # Elements near 0 are differences of large sums.
    rounding = 2e-6 * expected.kv.abs().max().item()
    torch.testing.assert_close(actual.kv, expected.kv, rtol=1e-4, atol=rounding)
    torch.testing.assert_close(actual.norm, expected.norm, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.tail, expected.tail, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.window, expected.window, rtol=1e-4, atol=1e-5)
    for row, length in enumerate(expected.lengths):
        for name in ("keys", "values", "weights"):
            torch.testing.assert_close(
                getattr(actual, name)[:, row, :length],
                getattr(expected, name)[:, row, :length],
                rtol=1e-4,
                atol=1e-5,
            )


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 16, 20, 24, 28])
@torch.no_grad()
def test_reading_in_two_pieces_equals_one_call(make_model, make_tokens, rule, options, cut):
    model, tokens = make_model(memory_rule=rule, **options), make_tokens(2, LENGTH)
    whole = model(tokens)
    first = model(tokens[:, :cut])
    second = model(tokens[:, cut:], memory=first.memory)
    logits = torch.cat((first.logits, second.logits), dim=1)
    torch.testing.assert_close(logits, whole.logits, rtol=1e-4, atol=1e-4)
    assert_same_memory(second.memory, whole.memory)


@torch.no_grad()
def test_reading_token_by_token_equals_one_call(make_model, make_tokens, rule, options):
    model, tokens = make_model(memory_rule=rule, **options), make_tokens(2, LENGTH)
    whole = model(tokens)
    memory, logits = None, []
    for token in tokens.split(1, dim=1):
        out = model(token, memory=memory)
        memory = out.memory
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, rtol=1e-4, atol=1e-4)
    assert_same_memory(out.memory, whole.memory)


@torch.no_grad()
def test_rows_with_open_segments_of_different_lengths_go_on_together(
    make_model, make_tokens, rule, options
):
    model = make_model(memory_rule=rule, **options)
    rows = [make_tokens(1, 11, seed=1), make_tokens(1, 22, seed=2)]
    more = make_tokens(2, 13, seed=3)
    together = model(more, memory=Memory.concatenate([model(row).memory for row in rows]))
    for index, row in enumerate(rows):
        alone = model(torch.cat((row, more[index : index + 1]), dim=1))
        torch.testing.assert_close(
            together.logits[index], alone.logits[0, -13:], rtol=1e-4, atol=1e-4
        )


def test_gradients_flow_through_an_open_segment(make_model, make_tokens, rule, options):
    """The loss of a length that ends inside a segment, whole or cut there, has one gradient."""
    model, tokens = make_model(memory_rule=rule, **options), make_tokens(1, LENGTH)
    model(tokens).logits.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    first = model(tokens[:, :13])
    second = model(tokens[:, 13:], memory=first.memory)
    (first.logits.square().sum() + second.logits.square().sum()).backward()
    for name, parameter in model.named_parameters():
        error = (parameter.grad - expected[name]).norm()
        assert error <= 1e-4 * expected[name].norm(), name


def test_memory_of_another_shape_is_refused(make_model, make_tokens):
    memory = make_model()(make_tokens(2, 4)).memory
    with pytest.raises(ValueError, match="does not fit"):
        make_model()(make_tokens(1, 4), memory=memory)
    with pytest.raises(ValueError, match="segment 8"):
        make_model(segment_length=4)(make_tokens(2, 4), memory=memory)


@pytest.mark.parametrize(
    ("option", "name", "on", "off"),
    [("write_gate", "weights", True, False), ("short_conv", "tail", 8, 4)],
)
def test_memory_of_other_options_is_refused(make_model, make_tokens, option, name, on, off):
    plain, other = make_model(memory={option: off}), make_model(memory={option: on})
    for one, two, value in ((plain, other, on), (other, plain, off)):
        with pytest.raises(ValueError, match=f"with {name} .* memory.{option} is {value}"):
            two(make_tokens(1, 4), memory=one(make_tokens(1, 4)).memory)


def test_no_tokens_are_refused(make_model):
    with pytest.raises(ValueError, match="at least one column"):
        make_model()(torch.zeros(1, 0, dtype=torch.long))


def test_what_was_read_without_gradients_does_not_keep_a_model_from_training(make_model):
    model = make_model()
    tokens = torch.randint(61, (1, LENGTH))
    with torch.inference_mode():
        model(tokens)
    model.loss(tokens).backward()
