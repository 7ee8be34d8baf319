import gc
import weakref

import torch

from infini_ds.layout import Layout, valid_tokens, whole_weights


def layout_of(*lengths: int) -> Layout:
    starts = torch.zeros(1, len(lengths), dtype=torch.bool)
    return Layout(starts, torch.tensor([lengths], dtype=torch.int32))


def test_valid_tokens_come_first():
    valid = valid_tokens(layout_of(3, 0, 1), 3)
    assert valid.tolist() == [[[True] * 3, [False] * 3, [True, False, False]]]


def test_weights_are_those_of_the_tokens_for_every_head():
    layout = layout_of(2, 3)
    weights = whole_weights(layout, 3, 2)
    assert (weights.shape, weights.dtype) == ((1, 2, 2, 3), torch.float32)
    assert weights.is_contiguous()
    for head in range(2):
        assert torch.equal(weights[:, :, head] == 1, valid_tokens(layout, 3))


def test_all_layers_share_what_is_made_of_a_layout():
    layout, other = layout_of(2, 3), layout_of(2, 3)
    assert whole_weights(layout, 3, 2) is whole_weights(layout, 3, 2)
    assert whole_weights(layout, 3, 2) is not whole_weights(other, 3, 2)
    assert whole_weights(layout, 3, 1).shape[2] == 1
    assert valid_tokens(layout, 4).shape[-1] == 4


def test_nothing_outlives_its_layout():
    layout = layout_of(2, 3)
    made = weakref.ref(whole_weights(layout, 3, 2))
    del layout
    gc.collect()
    assert made() is None


def test_training_may_use_what_inference_has_made():
    layout = layout_of(2)
    with torch.inference_mode():
        whole_weights(layout, 2, 1)
    factor = torch.ones(2, requires_grad=True)
    (whole_weights(layout, 2, 1) * factor).sum().backward()
    assert factor.grad is not None
