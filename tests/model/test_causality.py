"""What may influence what: earlier tokens of the same document, and nothing else."""

import pytest
import torch

from infini_ds.layout import Layout
from infini_ds.model.memory import Memory

SEGMENTS, N = 4, 8


def read(model, tokens, starts, lengths):
    """Hidden states [batch, segments, n, hidden] and the memory after the window."""
    layout = Layout(torch.tensor(starts, dtype=torch.bool), torch.tensor(lengths))
    memory = Memory.empty(model.config, tokens.shape[0])
    with torch.no_grad():
        hidden, layers, _ = model.read_window(tokens, layout, memory.layers())
    return hidden.unflatten(1, (SEGMENTS, N)), memory.with_layers(layers)


def change(tokens, where):
    changed = tokens.clone()
    changed[where] = (changed[where] + 1) % 61
    return changed


@pytest.mark.parametrize("place", [0, 5, 8, 19, 31])
def test_changed_token_changes_no_earlier_output(make_model, make_tokens, rule, options, place):
    model, tokens = make_model(memory_rule=rule, **options), make_tokens(1, SEGMENTS * N)
    with torch.no_grad():
        before = model(tokens).logits
        after = model(change(tokens, (0, place))).logits
    torch.testing.assert_close(before[:, :place], after[:, :place], rtol=1e-6, atol=1e-6)
    different = (before - after).abs().amax(-1)[0] > 1e-6
    assert different[place:].all(), "the memory must carry the change to every later token"


def test_documents_of_one_lane_are_isolated_bitwise(make_model, make_tokens, rule, options):
    model, tokens = make_model(memory_rule=rule, **options), make_tokens(2, SEGMENTS * N)
    starts, lengths = [[1, 0, 1, 0], [0, 0, 0, 1]], [[N] * 4] * 2
    hidden, memory = read(model, tokens, starts, lengths)

    # The first document of lane 0: only its own segments change.
    first, first_memory = read(model, change(tokens, (0, slice(0, 2 * N))), starts, lengths)
    assert torch.equal(hidden[0, 2:], first[0, 2:])
    assert torch.equal(memory.kv[:, 0], first_memory.kv[:, 0])
    assert torch.equal(memory.norm[:, 0], first_memory.norm[:, 0])
    assert not torch.equal(hidden[0, :2], first[0, :2])

    # The second document of lane 0: nothing before it, and nothing in lane 1.
    second, second_memory = read(model, change(tokens, (0, 2 * N)), starts, lengths)
    assert torch.equal(hidden[0, :2], second[0, :2])
    assert torch.equal(hidden[1], second[1])
    assert torch.equal(memory.kv[:, 1], second_memory.kv[:, 1])
    assert not torch.equal(memory.kv[:, 0], second_memory.kv[:, 0])


def test_document_start_drops_carried_memory_bitwise(make_model, make_tokens, rule, options):
    model, tokens = make_model(memory_rule=rule, **options), make_tokens(1, SEGMENTS * N)
    layout = Layout(torch.tensor([[True, False, False, False]]), torch.full((1, SEGMENTS), N))
    with torch.no_grad():
        carried = model(make_tokens(1, 2 * N, seed=1)).memory
        fresh = Memory.empty(model.config, 1)
        hidden, layers, _ = model.read_window(tokens, layout, fresh.layers())
        other, other_layers, _ = model.read_window(tokens, layout, carried.layers())
    assert torch.equal(hidden, other)
    for layer, other_layer in zip(layers, other_layers, strict=True):
        assert torch.equal(layer.kv, other_layer.kv)
        assert torch.equal(layer.norm, other_layer.norm)


def test_padding_changes_nothing_bitwise(make_model, make_tokens, rule, options):
    model, tokens = make_model(memory_rule=rule, **options), make_tokens(1, SEGMENTS * N)
    lengths = [[N, 3, N, 0]]
    hidden, memory = read(model, tokens, [[1, 0, 1, 1]], lengths)
    padding = torch.arange(N) >= torch.tensor(lengths[0])[:, None]  # [segments, n]
    other, other_memory = read(
        model, change(tokens, (0, padding.flatten())), [[1, 0, 1, 1]], lengths
    )
    assert torch.equal(hidden[0, ~padding], other[0, ~padding])
    assert torch.equal(memory.kv, other_memory.kv)
    assert torch.equal(memory.norm, other_memory.norm)


def test_segment_without_tokens_leaves_memory_alone(make_model, make_tokens, rule, options):
    model, tokens = make_model(memory_rule=rule, **options), make_tokens(1, SEGMENTS * N)
    _, memory = read(model, tokens, [[0] * 4], [[N, N, 0, 0]])
    with torch.no_grad():
        expected = model(tokens[:, : 2 * N]).memory
    torch.testing.assert_close(memory.kv, expected.kv)
    torch.testing.assert_close(memory.norm, expected.norm)
