"""Computes the least that any kernel must compute and move in a call of Infini-attention."""

from typing import NamedTuple

from infini_ds.memory import RULES


class Cost(NamedTuple):
    """Cost of one direction of one call."""

    flops: float
    bytes: float

    def floor(self, rates: "Rates") -> float:
        """Returns the fewest seconds a kernel can take, as it may compute and move data at once."""
        return max(self.flops / rates.flops, self.bytes / rates.bytes)


class Rates(NamedTuple):
    """Rates that a device reaches, per second."""

    flops: float
    bytes: float


class CallCost(NamedTuple):
    """Cost of both directions of one call."""

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
    """Returns the cost of one layer for batch size 1 and as many key-value heads as heads.

    FLOPs count only matrix products, and a multiply-add counts as 2. The forward pass computes, per
    token and head: the scores and their product with the values, each segment_length x head_dim, of
    which causality leaves half; the read, head_dim x head_dim; and the write, see
    `MemoryRule.write_flops`. The backward pass is taken to cost 2.5 times as much, which is right
    for local attention, whose two products become five, as scores are computed again. The memory's
    two become four (with the delta rule, its three become five), so that with the linear rule and
    heads of 128 the sum is too high by 7% at segments of 512 and by 2% at 2048.

    Bytes count traffic of device memory. The forward pass reads q, k and v, and writes the output
    and the log-sum-exp of each row in fp32. The backward pass reads q, k, v, the output, its
    gradient and the log-sum-exp, and writes the gradients of q, k and v. The memories that the
    segments read are not counted, because a kernel that goes from segment to segment need not write
    them.
    """
    rows = segments * segment_length * heads
    local = 2 * 2 * segment_length * head_dim / 2
    memory = 2 * head_dim**2 + RULES[rule].write_flops(head_dim, segment_length)
    flops = rows * (local + memory)
    tensor, log_sum = rows * head_dim * itemsize, rows * 4
    return CallCost(Cost(flops, 4 * tensor + log_sum), Cost(2.5 * flops, 8 * tensor + log_sum))
