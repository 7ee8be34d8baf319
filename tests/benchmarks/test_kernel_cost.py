"""What a call costs at least, pinned to figures worked out by hand for an H100."""

import pytest

from infini_ds.benchmarks.kernel_cost import Cost, Rates, call_cost

H100 = Rates(flops=790e12, bytes=3.0e12)
"""Measured."""
MICROSECONDS = {  # forward and backward: compute, then bytes
    512: ((65, 163), (90, 179)),
    2048: ((783, 1957), (359, 717)),
}


@pytest.mark.parametrize("segment_length", MICROSECONDS)
def test_cost_of_32_heads_and_16_segments_is_that_of_the_table(segment_length):
    cost = call_cost(segments=16, segment_length=segment_length, heads=32, head_dim=128)
    compute, moved = MICROSECONDS[segment_length]
    assert tuple(round(1e6 * part.flops / H100.flops) for part in cost) == compute
    assert tuple(round(1e6 * part.bytes / H100.bytes) for part in cost) == moved


def test_floor_is_the_slower_of_compute_and_bytes():
    rates = Rates(flops=10, bytes=5)
    assert Cost(flops=20, bytes=5).floor(rates) == 2
    assert Cost(flops=10, bytes=15).floor(rates) == 3
