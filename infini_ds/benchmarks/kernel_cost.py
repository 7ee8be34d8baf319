"""What a call of Infini-attention must compute and move at least, whatever kernel does it."""

from typing import NamedTuple

from infini_ds.memory import RULES


class Cost(NamedTuple):
    """Of one direction of one call."""

    flops: float
    bytes: float

    def floor(self, rates: "Rates") -> float:
        """Seconds below which no kernel comes: it can compute and move at the same time."""
        return max(self.flops / rates.flops, self.bytes / rates.bytes)


class Rates(NamedTuple):
    """What a device reaches, per second."""

    flops: float
    bytes: float


class CallCost(NamedTuple):
    """Of both directions."""

    forward: Cost
    backward: Cost


def call_cost(
    segments: int,
    segment_length: int,
    heads: int,
    head_dim: int,
    rule: str = "linear",
    itemsize: int = 2,
) -> CallCost:
    """Of one layer, batch 1, as many key-value heads as heads.

    FLOPs, a multiply-add counting as 2, of matrix products alone. Forward, per token and head:
    scores and their product with the values, each segment_length x head_dim, of which causality
    leaves half; the read and the write, each head_dim x head_dim; by the delta rule what keys read
    back, as much again. Backward is taken to be 2.5 times that. It is so for local attention, whose
    two products become five (scores are computed again); the memory's two become four (its three,
    five), so by the linear rule the sum is too high by 7% at segments of 512 and 2% at 2048, with
    heads of 128.

    Bytes of device memory. Forward reads q, k and v and writes the output, and the log-sum-exp of
    each row in fp32. Backward reads q, k, v, the output, its gradient and the log-sum-exp, and
    writes the gradients of q, k and v. The memories that the segments read are not counted: a
    kernel that goes from segment to segment need not write them.
    """
    rows = segments * segment_length * heads
    local = 2 * 2 * segment_length * head_dim / 2
    memory = 2 * (2 + RULES[rule].reads_of_a_key) * head_dim**2
    flops = rows * (local + memory)
    tensor, log_sum = rows * head_dim * itemsize, rows * 4
    return CallCost(Cost(flops, 4 * tensor + log_sum), Cost(2.5 * flops, 8 * tensor + log_sum))
