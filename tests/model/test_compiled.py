"""What is compiled around the attention computes the same, in one graph for all blocks."""

import pytest
import torch

from infini_ds.model.transformer import InfiniTransformer

SHARED = 2
"""Graphs of all blocks together: before the attention, and behind it."""


@pytest.fixture
def graphs():
    """Called, the number of graphs compiled since the test began."""
    from torch._dynamo.utils import counters  # importing it takes seconds

    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def compiled(model: InfiniTransformer) -> InfiniTransformer:
    for block in model.blocks:
        block.compiled = True
    return model


@pytest.mark.parametrize("checkpointing", ["none", "attention", "block"])
def test_loss_and_gradients_are_the_same(graphs, make_model, make_tokens, options, checkpointing):
    tokens, found = make_tokens(2, 33), []
    for prepared in (lambda model: model, compiled):
        model = prepared(make_model(checkpointing, qk_norm=True, mlp_bias=True, **options))
        loss = model.loss(tokens)
        loss.backward()
        found.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert graphs() == SHARED


@pytest.mark.parametrize("layers", [1, 4])
def test_number_of_graphs_is_that_of_one_block(graphs, make_model, make_tokens, layers):
    model = compiled(make_model(num_layers=layers))
    for seed in range(3):
        model.loss(make_tokens(2, 33, seed)).backward()
        assert graphs() == SHARED
    with torch.no_grad():
        model.eval().loss(make_tokens(1, 20))
    model.train().loss(make_tokens(2, 33)).backward()
    assert graphs() == SHARED


def test_nothing_is_compiled_in_evaluation_and_generation(graphs, make_model, make_tokens):
    plain, model = make_model().eval(), compiled(make_model()).eval()
    for length in (9, 16, 21):
        tokens = make_tokens(1, length)
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
        assert torch.equal(*(m.generate(tokens, 3, temperature=0) for m in (model, plain)))
    assert graphs() == 0


def test_names_of_weights_are_the_same(make_model):
    assert compiled(make_model()).state_dict().keys() == make_model().state_dict().keys()


def test_compiled_blocks_keep_no_more_for_the_backward_pass(graphs, make_model):
    kept = []
    for prepared in (lambda model: model, compiled):
        block = prepared(make_model(hidden_act="gelu", mlp_bias=True)).train().blocks[0]
        weights = {weight.untyped_storage()._cdata for weight in block.parameters()}
        storages = {}

        def keep(x, storages=storages):
            storages[x.untyped_storage()._cdata] = x.untyped_storage()
            return x

        hidden, attended = (torch.randn(2, 16, 32, requires_grad=True) for _ in range(2))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            _ = block.project(hidden), block.feed_forward(hidden, attended)
        kept.append(sum(own.nbytes() for at, own in storages.items() if at not in weights))
    assert kept[1] <= kept[0]
    assert graphs() == SHARED
