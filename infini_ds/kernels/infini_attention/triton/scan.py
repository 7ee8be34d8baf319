"""Scans in fp32 over the segments of a window, restarting where a document starts."""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
import triton
import triton.language as tl


@triton.jit
def scan_kernel(
    x,
    incoming,
    final,
    starts,
    segments,
    kv_heads,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Replaces in x what each segment adds by what each segment finds, eq. (4).

    In reverse, it replaces the gradient of what each segment found by that of what it added.
    There is one program per part of a state, lane and key-value head.

    x [batch, segments, kv_heads, SIZE]; incoming, final [batch, kv_heads, SIZE]; all fp32;
    starts [batch, segments] bytes. In reverse, `incoming` is the gradient of the final state and
    `final` that of the incoming one.
    """
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < SIZE
    lane = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    outer = (lane * kv_heads + kv_head) * SIZE + offsets
    state = tl.load(incoming + outer, mask=inside, other=0.0)
    for step in range(segments):
        segment = segments - 1 - step if REVERSE else step
        at = lane * segments + segment
        started = tl.load(starts + at) != 0
        place = x + (at * kv_heads + kv_head) * SIZE + offsets
        own = tl.load(place, mask=inside, other=0.0)
        if REVERSE:
            tl.store(place, state, mask=inside)
            state = tl.where(started, 0.0, state + own)
        else:
            state = tl.where(started, 0.0, state)
            tl.store(place, state, mask=inside)
            state += own
    tl.store(final + outer, state, mask=inside)
