"""Initial weights are a function of seed and place alone."""

import pytest
import torch

from infini_ds.model.layers import initialize, layer_list


def test_layer_built_alone_has_the_same_weights(make_model):
    model = make_model()
    for index, layer in enumerate(layer_list(model.config)):
        torch.manual_seed(index)
        alone = layer.module(*layer.args)
        initialize(alone, index, model.config, seed=0)
        for name, parameter in alone.named_parameters():
            assert torch.equal(parameter, model.layers[index].get_parameter(name)), name


def test_options_change_no_other_initial_weight(make_model):
    plain, other = make_model(), make_model(memory={"write_gate": True, "short_conv": True})
    for name, parameter in plain.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter), name


def test_write_gates_start_near_one_half_and_convolutions_as_the_identity(make_model):
    config = make_model(
        hidden_size=512, initializer_range=0.3, memory={"write_gate": True, "short_conv": True}
    ).config
    layer = layer_list(config)[1]
    block = layer.module(*layer.args)
    initialize(block, 1, config, seed=0)
    weight = block.get_parameter("self_attn.write_gate.weight")
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not block.get_parameter("self_attn.write_gate.bias").any()
    taps = block.get_parameter("self_attn.short_conv.weight")
    assert torch.equal(taps, torch.eye(5)[-1:].expand_as(taps))


def test_gates_start_at_gate_init(make_model):
    assert (make_model(gate_init=-2.0).blocks[1].self_attn.beta == -2).all()
