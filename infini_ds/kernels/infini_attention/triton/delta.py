"""The delta rule, eq. (5): a walk over the segments with the state on chip, and its gradient.

Each column of a memory's kv depends on the same column of the values alone, so the columns are
shared out among programs.
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
import triton
import triton.language as tl

from infini_ds.kernels.infini_attention.triton.tiles import load_rows, sigma


@triton.jit
def damping_kernel(
    k,
    weight,
    norm,
    added_norm,
    damping,
    k_segment,
    k_row,
    k_head,
    n,
    kv_heads,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """The guard of the delta rule, see `delta_damping`: one program per key-value head and segment.

    k [segments, n, kv_heads, D]; weight [segments, kv_heads, n]; norm, before the segment, and
    added_norm [segments, kv_heads, D]; damping [segments, kv_heads]. All but k in fp32.
    """
    kv_head = tl.program_id(0)
    segment = tl.program_id(1).to(tl.int64)
    at = segment * kv_heads + kv_head
    features = tl.arange(0, D)
    own_norm = tl.load(norm + at * D + features)
    x = tl.load(added_norm + at * D + features)
    previous = x
    for _ in range(2):
        previous = x
        x = tl.zeros((D,), tl.float32)
        for start in range(0, n, BLOCK_ROWS):
            rows = start + tl.arange(0, BLOCK_ROWS)
            keys = load_rows(k + segment * k_segment + kv_head * k_head, rows, k_row, n, D)
            own_weight = tl.load(weight + at * n + rows, mask=rows < n, other=0.0)
            sigma_k = sigma(keys.to(tl.float32))
            denominator = tl.maximum(tl.sum(sigma_k * own_norm[None, :], axis=1), EPSILON)
            along = tl.sum(sigma_k * previous[None, :], axis=1) / denominator
            x += tl.sum(sigma_k * (own_weight * along)[:, None], axis=0)
    bound = tl.max(x / tl.maximum(previous, EPSILON), axis=0)
    own = tl.minimum(2 / tl.maximum(bound, EPSILON), 1.0)
    tl.store(damping + at, tl.where(tl.sum(own_norm, axis=0) > 0, own, 0.0))


@triton.jit
def delta_kernel(
    k,
    v,
    weight,
    norm,
    damping,
    starts,
    incoming,
    kv,
    final,
    k_segment,
    k_row,
    k_head,
    v_segment,
    v_row,
    v_head,
    n,
    segments,
    kv_heads,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """kv, before each segment, and `final` from the `incoming` one.

    One program per part of the columns, and per lane and key-value head.

    k, v [batch x segments, n, kv_heads, D]; weight [batch x segments, kv_heads, n]; norm, before
    each segment [batch x segments, kv_heads, D]; damping [batch x segments, kv_heads]; kv
    [batch x segments, kv_heads, D, D]; incoming, final [batch, kv_heads, D, D].
    """
    features = tl.arange(0, D)
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    lane = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    places = features[:, None] * D + columns[None, :]
    outer = (lane * kv_heads + kv_head) * D * D
    state = tl.load(incoming + outer + places)
    for step in range(segments):
        segment = lane * segments + step
        at = segment * kv_heads + kv_head
        state = tl.where(tl.load(starts + segment) != 0, 0.0, state)
        tl.store(kv + at * D * D + places, state)
        own_norm = tl.load(norm + at * D + features)
        own_damping = tl.load(damping + at)
        own_k = k + segment * k_segment + kv_head * k_head
        own_v = v + segment * v_segment + kv_head * v_head
        added = tl.zeros((D, BLOCK_V), tl.float32)
        for start in range(0, n, BLOCK_ROWS):
            rows = start + tl.arange(0, BLOCK_ROWS)
            keys = load_rows(own_k, rows, k_row, n, D)
            values = tl.load(
                own_v + rows[:, None] * v_row + columns[None, :],
                mask=rows[:, None] < n,
                other=0.0,
            )
            own_weight = tl.load(weight + at * n + rows, mask=rows < n, other=0.0)
            sigma_k = sigma(keys.to(tl.float32))
            denominator = tl.maximum(tl.sum(sigma_k * own_norm[None, :], axis=1), EPSILON)
            read = tl.dot(sigma_k.to(keys.dtype), state.to(keys.dtype), input_precision="ieee")
            written = values.to(tl.float32) - read * (own_damping / denominator)[:, None]
            weighted = (sigma_k * own_weight[:, None]).to(keys.dtype)
            added = tl.dot(
                tl.trans(weighted), written.to(keys.dtype), added, input_precision="ieee"
            )
        state += added
    tl.store(final + outer + places, state)


@triton.jit
def delta_gradient_kernel(
    k,
    weight,
    kv,
    norm,
    damping,
    starts,
    d_final,
    d_kv,
    d_incoming,
    d_norm,
    k_segment,
    k_row,
    k_head,
    n,
    segments,
    kv_heads,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The walk back: d_kv in place, from the gradient of what each segment read to that of the
    memory after it, and d_incoming from d_final. Shapes as in `delta_kernel`.

    d_norm [parts of the columns, batch x segments, kv_heads, D] takes what the norm before each
    segment gets through the delta rule's own read.
    """
    part = tl.program_id(0)
    features = tl.arange(0, D)
    columns = part * BLOCK_V + tl.arange(0, BLOCK_V)
    lanes = tl.num_programs(1) // kv_heads
    lane = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    places = features[:, None] * D + columns[None, :]
    outer = (lane * kv_heads + kv_head) * D * D
    d_state = tl.load(d_final + outer + places)
    for step in range(segments):
        segment = lane * segments + segments - 1 - step
        at = segment * kv_heads + kv_head
        d_read_state = tl.load(d_kv + at * D * D + places)
        tl.store(d_kv + at * D * D + places, d_state)
        state = tl.load(kv + at * D * D + places)
        own_norm = tl.load(norm + at * D + features)
        own_damping = tl.load(damping + at)
        own_k = k + segment * k_segment + kv_head * k_head
        taken = tl.zeros((D, BLOCK_V), tl.float32)
        own_d_norm = tl.zeros((D,), tl.float32)
        for start in range(0, n, BLOCK_ROWS):
            rows = start + tl.arange(0, BLOCK_ROWS)
            keys = load_rows(own_k, rows, k_row, n, D)
            own_weight = tl.load(weight + at * n + rows, mask=rows < n, other=0.0)
            sigma_k = sigma(keys.to(tl.float32))
            denominator = tl.maximum(tl.sum(sigma_k * own_norm[None, :], axis=1), EPSILON)
            share = own_damping / denominator
            weighted = (sigma_k * own_weight[:, None]).to(keys.dtype)
            d_values = tl.dot(weighted, d_state.to(keys.dtype), input_precision="ieee")
            read = tl.dot(sigma_k.to(keys.dtype), state.to(keys.dtype), input_precision="ieee")
            along = tl.sum(d_values * read, axis=1) * share / denominator
            own_d_norm += tl.sum(sigma_k * along[:, None], axis=0)
            shared_out = (sigma_k * share[:, None]).to(keys.dtype)
            taken = tl.dot(
                tl.trans(shared_out), d_values.to(keys.dtype), taken, input_precision="ieee"
            )
        norm_at = (part * lanes * segments + segment) * kv_heads + kv_head
        tl.store(d_norm + norm_at * D + features, own_d_norm)
        started = tl.load(starts + segment) != 0
        d_state = tl.where(started, 0.0, d_state - taken + d_read_state)
    tl.store(d_incoming + outer + places, d_state)
