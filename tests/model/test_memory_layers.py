"""Memories in some layers only."""

import pytest
import torch

from infini_ds import Memory
from infini_ds.config.model import LARGEST_GATE
from infini_ds.errors import UserError
from infini_ds.memory import RULES
from infini_ds.model.layer_state import state_shapes

LAYERS = [(0,), (1, 2), ()]
WRITING = {"write_gate": True, "short_conv": 3}


@pytest.fixture(params=LAYERS, ids=str)
def layers(request):
    return request.param


@pytest.fixture
def some(make_model, rule, layers):
    return make_model(
        num_layers=3, memory_rule=rule, use_sliding_window=True,
        memory=WRITING | {"layers": list(layers)},
    ).double()  # fmt: skip


@pytest.fixture
def everywhere(make_model, rule, some):
    """The same weights with a memory in each layer, of which the added ones have closed gates."""
    model = make_model(
        num_layers=3, memory_rule=rule, use_sliding_window=True, memory=WRITING
    ).double()
    own = dict(some.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in own:
                parameter.copy_(own[name])
    return model


def test_others_are_as_if_their_gates_were_closed(some, everywhere, layers, make_tokens):
    tokens = make_tokens(2, 37)
    losses = [model.loss(tokens) for model in (some, everywhere)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    for loss in losses:
        loss.backward()
    expected = {name: p.grad for name, p in everywhere.named_parameters()}
    for name, parameter in some.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)
    for layer, block in enumerate(some.blocks):
        assert (block.self_attn.write_gate is not None) == (layer in layers)
        if layer not in layers:
            assert (block.self_attn.beta == -LARGEST_GATE).all()
            assert not block.self_attn.beta.grad.any()


@torch.no_grad()
def test_a_memory_has_the_states_of_these_layers(some, rule, layers, make_tokens, tmp_path):
    tokens = make_tokens(2, 37)
    whole = some(tokens)
    kv_heads, features, d = RULES[rule].specs(2, 8)["kv"]
    assert whole.memory.kv.shape == (len(layers), 2, kv_heads, features, d)
    assert whole.memory.memory_layers == layers
    for layer, state in enumerate(whole.memory.layers()):
        assert (state.kv.numel() > 0) == (layer in layers)
        shapes = state_shapes(some.config.of_layer(layer))
        assert {name: x.shape[1:] for name, x in state.named().items()} == shapes

    whole.memory.save(tmp_path / "memory")
    loaded = Memory.load(tmp_path / "memory")
    loaded.check(some.config, 2)
    assert loaded.memory_layers == layers
    assert torch.equal(loaded.kv, whole.memory.kv)
    more = make_tokens(2, 20, seed=1)
    expected = some(torch.cat((tokens, more), dim=1)).logits[:, 37:]
    logits = some(more, memory=loaded.to(dtype=torch.float64)).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)  # kept in fp32


@torch.no_grad()
def test_another_models_memory_is_refused(make_model, make_tokens):
    first, second, both = (make_model(memory={"layers": layers}) for layers in ([0], [1], None))
    tokens = make_tokens(1, 20)
    memory = first(tokens).memory
    message = r"memory of layers \[0\] does not fit this model, whose memory.layers is "
    with pytest.raises(ValueError, match=message + r"\[1\]"):
        second(tokens, memory=memory)
    with pytest.raises(ValueError, match=message + "null"):
        both(tokens, memory=memory)
    with pytest.raises(ValueError, match="layers null, all does not fit"):
        first(tokens, memory=both(tokens).memory)
    with pytest.raises(ValueError, match="of different layers"):
        Memory.concatenate([memory, second(tokens).memory])


@pytest.mark.parametrize("told", ["[0, 1]", "[2]", "[0, 0]", "0", "x", "null", '["0"]'])
@torch.no_grad()
def test_a_file_that_tells_other_layers_is_damaged(told, make_model, make_tokens, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "memory"
    make_model(memory={"layers": [1]})(make_tokens(1, 20)).memory.save(path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    save_file(tensors, path, metadata | {"memory_layers": told})
    with pytest.raises(UserError, match="is damaged"):
        Memory.load(path)


def test_a_layers_config_is_of_its_kind(make_model):
    config = make_model(num_layers=4, memory={"layers": [1, 2]}).config
    kinds = [config.of_layer(layer) for layer in range(4)]
    assert [len(kind.memory_layers) for kind in kinds] == [0, 4, 4, 0]
    assert kinds[0] == kinds[3]
    assert kinds[1] == kinds[2]
    assert config.of_blocks(range(2, 4)).memory.layers == (0,)
    assert config.of_blocks(range(2, 4)).num_layers == 2
    assert config.of_blocks(range(3, 4)).memory.layers == ()
    everywhere = make_model(num_layers=4).config
    assert everywhere.of_layer(3) is everywhere
    assert everywhere.of_blocks(range(1, 3)).memory_layers == range(2)
