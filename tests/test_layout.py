import gc
import weakref

import torch

from infini_ds.layout import (
    Layout,
    document_begins,
    document_ends,
    made_once,
    memory_tokens,
    valid_tokens,
    whole_weights,
)


def layout_of(*lengths: int) -> Layout:
    starts = torch.zeros(1, len(lengths), dtype=torch.bool)
    return Layout(starts, torch.tensor([lengths], dtype=torch.int32))


def test_valid_tokens_come_first():
    valid = valid_tokens(layout_of(3, 0, 1), 3)
    assert valid.tolist() == [[[True] * 3, [False] * 3, [True, False, False]]]


def packed() -> Layout:
    """A document of 2 tokens, one of 1, one of 2, and padding; and a segment without guests."""
    begins = torch.tensor([[[0, 0, 2, 3, 3, 6], [0, 0, 0, 6, 6, 6]]], dtype=torch.int32)
    return layout_of(2, 3)._replace(begins=begins)


def test_only_the_first_document_of_a_packed_segment_uses_the_memory():
    layout = packed()
    first = [[[True] * 2 + [False] * 4, [True] * 3 + [False] * 3]]
    assert memory_tokens(layout, 6).tolist() == first
    assert whole_weights(layout, 6, 1)[:, :, 0].bool().tolist() == first
    assert valid_tokens(layout, 6).tolist() == [[[True] * 5 + [False], [True] * 3 + [False] * 3]]


def test_padding_counts_as_documents_of_one_token():
    layout = packed()
    begins = document_begins(layout)
    assert begins is not None
    assert begins.tolist() == [[[0, 0, 2, 3, 3, 5], [0, 0, 0, 3, 4, 5]]]
    assert document_begins(layout) is begins
    assert document_begins(layout_of(2, 3)) is None


def test_ends_of_documents():
    layout = packed()
    ends = document_ends(layout)
    assert ends is not None
    assert ends.dtype == torch.int32
    assert ends.tolist() == [[[2, 2, 3, 5, 5, 6], [3, 3, 3, 4, 5, 6]]]
    assert document_ends(layout) is ends
    assert document_ends(layout_of(2, 3)) is None


def test_a_layout_is_mapped_part_by_part():
    parts = packed().map(lambda part: part[:, 1:])
    assert [part.shape[1] for part in parts if part is not None] == [1, 1, 1]
    assert layout_of(2, 3).map(torch.clone).begins is None


def test_anything_is_made_once_of_a_tensor():
    made = []
    source, other = torch.zeros(1), torch.zeros(1)

    def make() -> list[int]:
        made.append(1)
        return [len(made)]

    results = [made_once(source, ("list",), make), made_once(source, ("list",), make)]
    assert results[0] is results[1]
    assert made_once(other, ("list",), make) == [2]
    assert made_once(source, ("another",), make) == [3]


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
