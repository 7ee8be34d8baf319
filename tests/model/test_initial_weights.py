"""Initial weights are a function of seed and place alone."""

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


def test_gates_start_at_gate_init(make_model):
    assert (make_model(gate_init=-2.0).blocks[1].self_attn.beta == -2).all()
