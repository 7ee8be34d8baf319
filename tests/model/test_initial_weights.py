"""Initial weights are a function of seed and place alone."""

import pytest
import torch

from infini_ds.model.layers import initialize, layer_list
from infini_ds.model.transformer import InfiniTransformer


def test_layer_built_alone_has_the_same_weights(make_model):
    model = make_model()
    for index, layer in enumerate(layer_list(model.config)):
        torch.manual_seed(index)
        alone = layer.module(*layer.args)
        initialize(alone, index, model.config, seed=0)
        for name, parameter in alone.named_parameters():
            assert torch.equal(parameter, model.layers[index].get_parameter(name)), name


def test_write_gates_change_no_other_initial_weight(make_model):
    plain, other = make_model(), make_model(memory={"write_gate": True})
    for name, parameter in plain.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter), name


@pytest.mark.parametrize(("own", "expected"), [(0.0, 0.05), (0.4, 0.4)])
def test_embedding_may_have_a_deviation_of_its_own(make_model, own, expected):
    ranges = {"initializer_range": 0.05, "embedding_initializer_range": own}
    config = make_model(vocab_size=2000, **ranges).config
    model = InfiniTransformer(config, seed=0)
    assert model.layers[0].weight.std().item() == pytest.approx(expected, rel=0.02)
    assert model.head()[0].std().item() == pytest.approx(0.05, rel=0.02)
    plain = InfiniTransformer(config.model_copy(update={"embedding_initializer_range": 0.0}), 0)
    for name, parameter in plain.named_parameters():
        scale = expected / 0.05 if name == "layers.0.weight" else 1
        torch.testing.assert_close(model.get_parameter(name), parameter * scale)


def initial_block(config):
    layer = layer_list(config)[1]
    block = layer.module(*layer.args)
    initialize(block, 1, config, seed=0)
    return block


def test_write_gates_start_near_one_half(make_model):
    config = make_model(hidden_size=512, initializer_range=0.3, memory={"write_gate": True}).config
    block = initial_block(config)
    weight = block.get_parameter("self_attn.write_gate.weight")
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not block.get_parameter("self_attn.write_gate.bias").any()


@pytest.mark.parametrize("taps", [1, 2, 4, 8])
def test_keys_start_as_queries_of_earlier_tokens(make_model, taps):
    tokens = 12
    config = make_model(
        num_heads=4, num_kv_heads=2, head_dim=32, memory={"short_conv": taps}
    ).config
    attention = initial_block(config).self_attn
    projected = attention.project(torch.randn(1, 1, tokens, config.hidden_size))[0]
    convolved, _ = attention.short_conv(projected, torch.zeros(1, 1, taps, 8, 32))
    unchanged = [0, 2, 6, 7]  # queries with even numbers, and values
    assert torch.equal(convolved[..., unchanged, :], projected[..., unchanged, :])
    q, k, _ = (x[0, 0] for x in attention._split(convolved))
    own, next_key = q[:, ::2], q[:, 1::2]
    k = k - 0.1 * own
    held = [
        [i for i in range(taps + 1) if torch.allclose(k[i:, :, c], own[: tokens - i, :, c])]
        for c in range(32)
    ]
    assert all(len(back) == 1 for back in held)
    assert {back for (back,) in held} == set(range(1, taps + 1))
    assert held[:16] == held[16:]  # rotary positions rotate them as pairs
    torch.testing.assert_close(next_key[:-1], k[1:])


@pytest.mark.parametrize("rule", ["linear", "gated_delta"])
def test_first_tokens_of_documents_have_gradients_like_others(make_model, rule):
    config = make_model(
        memory_rule=rule, segment_length=8, memory={"short_conv": 4, "write_gate": True}
    ).config
    model = InfiniTransformer(config, seed=0)
    tokens = torch.randint(0, config.vocab_size, (4, 32))
    model.loss(tokens).backward()
    filters = model.blocks[0].self_attn.short_conv.weight.grad
    heads, kv_heads = config.num_heads, config.kv_heads
    q, k, _ = filters.unflatten(0, (-1, config.head_dim)).split((heads, kv_heads, kv_heads))
    assert k.norm() < 10 * q.norm()


def test_of_many_queries_of_a_group_two_start_like_its_key(make_model):
    config = make_model(num_heads=8, num_kv_heads=2, head_dim=32, memory={"short_conv": 4}).config
    attention = initial_block(config).self_attn
    projections = attention.qkv_proj.weight.unflatten(0, (-1, 32))
    same = [[torch.equal(projections[q], projections[8 + k]) for q in range(8)] for k in (0, 1)]
    assert [[q for q in range(8) if row[q]] for row in same] == [[0, 1], [4, 5]]


@pytest.mark.parametrize("taps", [1, 4, 8])
def test_a_query_finds_what_followed_its_token(make_model, taps):
    config = make_model(
        num_heads=1, num_kv_heads=1, hidden_size=256, head_dim=256, memory={"short_conv": taps}
    ).config
    attention = initial_block(config).self_attn
    tokens = torch.randn(31, 256)[[*range(31), 7]]  # token 7 comes again
    projected = attention.project(tokens[None, None])[0]
    convolved, _ = attention.short_conv(projected, torch.zeros(1, 1, taps, 3, 256))
    q, k, _ = (x[0, 0, :, 0] for x in attention._split(convolved))
    assert (q[-1] @ k.T).argmax() == 8


def test_a_query_finds_the_longest_sequence(make_model):
    """Of two heads, the second, on the average of many texts."""
    config = make_model(
        num_heads=2, num_kv_heads=2, hidden_size=256, head_dim=256, memory={"short_conv": 4}
    ).config
    attention = initial_block(config).self_attn
    places = [*range(9), 7, *range(10, 20), 5, 6, 7]  # 7 three times, once after 6
    projected = attention.project(torch.randn(100, 1, 20, 256)[:, :, places])[0]
    convolved, _ = attention.short_conv(projected, torch.zeros(100, 1, 4, 6, 256))
    q, k, _ = (x[:, 0, :, 1] for x in attention._split(convolved))
    scores = torch.einsum("bd,bkd->k", q[:, -1], k)
    assert scores.argmax() == 8
    assert scores[8] > 1.5 * scores[10]


def test_gates_start_at_gate_init(make_model):
    assert (make_model(gate_init=-2.0).blocks[1].self_attn.beta == -2).all()
