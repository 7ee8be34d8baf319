"""Positions and their bins."""

import pytest
import torch

from infini_ds.evaluation.by_position import bin_of, position_bins


@pytest.mark.parametrize(
    ("first", "longest", "bins"),
    [
        (128, 1, [0]),
        (128, 128, [0]),
        (128, 129, [0, 128]),
        (128, 1024, [0, 128, 256, 512]),
        (128, 1025, [0, 128, 256, 512, 1024]),
    ],
)
def test_bins_double_up_to_the_longest_document(first, longest, bins):
    assert position_bins(first, longest) == bins


def test_bin_of_a_position():
    positions = torch.tensor([0, 127, 128, 255, 256, 511, 512, 9999])
    assert bin_of(positions, [0, 128, 256, 512]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert bin_of(positions, [0]).tolist() == [0] * 8
