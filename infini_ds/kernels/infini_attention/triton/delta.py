"""The delta rule, eq. (5), as one matrix per segment, see `segment_overlaps`, and its gradient.

The overlaps of all segments are summed at once, and the walk from segment to segment then needs
only matrices. Each column of a memory depends on the same column of what is written, so the walk
divides the columns among programs. Products of states have fp32 operands and use PRECISION.
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
import triton
import triton.language as tl

from infini_ds.kernels.infini_attention.triton.tiles import load_rows, load_state, sigma, tile


@triton.jit
def reciprocal_read(sigma_k, norm, EPSILON: tl.constexpr):
    """Computes 1 / (sigma(k) z) of each row, 0 where nothing is stored."""
    read = tl.maximum(tl.sum(sigma_k * norm[None, :], axis=1), EPSILON)
    return tl.where(tl.sum(norm, axis=0) > 0, 1 / read, 0.0)


@triton.jit
def overlap_kernel(
    k,
    weight,
    norm,
    overlaps,
    k_segment,
    k_row,
    k_head,
    n,
    kv_heads,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Computes O / damping of one key-value head and segment, zero where nothing is stored.

    k [segments, n, kv_heads, D]; weight [segments, kv_heads, n]; norm [segments, kv_heads, D], the
    norm before each segment; overlaps [segments, kv_heads, D, D]. All but k are fp32.
    """
    kv_head = tl.program_id(0)
    segment = tl.program_id(1).to(tl.int64)
    at = segment * kv_heads + kv_head
    features = tl.arange(0, D)
    own_norm = tl.load(norm + at * D + features)
    overlap = tl.zeros((D, D), tl.float32)
    for start in range(0, n, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        keys = load_rows(k + segment * k_segment + kv_head * k_head, rows, k_row, n, D)
        own_weight = tl.load(weight + at * n + rows, mask=rows < n, other=0.0)
        sigma_k = sigma(keys.to(tl.float32))
        share = own_weight * reciprocal_read(sigma_k, own_norm, EPSILON)
        root = (sigma_k * tl.sqrt(share)[:, None]).to(keys.dtype)
        overlap = tl.dot(tl.trans(root), root, overlap, input_precision="ieee")
    tl.store(tile(overlaps + at * D * D, features, D, D), overlap)


@triton.jit
def damping_kernel(overlaps, added_norm, damping, kv_heads, EPSILON: tl.constexpr, D: tl.constexpr):
    """Computes the damping of one key-value head and segment, see `delta_damping`.

    overlaps [segments, kv_heads, D, D]; added_norm [segments, kv_heads, D]; damping
    [segments, kv_heads].
    """
    at = tl.program_id(1).to(tl.int64) * kv_heads + tl.program_id(0)
    overlap = load_state(overlaps, at, D)
    added = tl.load(added_norm + at * D + tl.arange(0, D))
    previous = tl.sum(overlap * added[None, :], axis=1)
    x = tl.sum(overlap * previous[None, :], axis=1)
    bound = tl.max(x / tl.maximum(previous, EPSILON), axis=0)
    tl.store(damping + at, tl.minimum(2 / tl.maximum(bound, EPSILON), 1.0))


@triton.jit
def delta_kernel(
    overlaps,
    damping,
    starts,
    incoming,
    kv,
    final,
    segments,
    kv_heads,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Replaces in kv what each segment writes by what it finds, and computes `final`.

    There is one program per part of the columns, lane and key-value head.

    overlaps, kv [batch x segments, kv_heads, D, D]; damping [batch x segments, kv_heads], or None
    if it is 1; starts [batch x segments] bytes; incoming, final [batch, kv_heads, D, D].
    """
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    lane = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    places = tl.arange(0, D)[:, None] * D + columns[None, :]
    outer = (lane * kv_heads + kv_head) * D * D
    state = tl.load(incoming + outer + places)
    for step in range(segments):
        segment = lane * segments + step
        at = segment * kv_heads + kv_head
        state = tl.where(tl.load(starts + segment) != 0, 0.0, state)
        added = tl.load(kv + at * D * D + places)
        tl.store(kv + at * D * D + places, state)
        overlap = load_state(overlaps, at, D)
        if damping is not None:
            overlap = overlap * tl.load(damping + at)
        state += added - tl.dot(overlap, state, input_precision=PRECISION)
    tl.store(final + outer + places, state)


@triton.jit
def delta_gradient_kernel(
    overlaps,
    damping,
    starts,
    d_final,
    d_kv,
    d_incoming,
    segments,
    kv_heads,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Walks back: replaces in d_kv the gradient of what each segment found by that of the memory
    after it, and computes d_incoming. Shapes are as in `delta_kernel`.

    Overlaps are symmetric unless TRANSPOSED is set."""
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    lane = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    places = tl.arange(0, D)[:, None] * D + columns[None, :]
    outer = (lane * kv_heads + kv_head) * D * D
    d_state = tl.load(d_final + outer + places)
    for step in range(segments):
        segment = lane * segments + segments - 1 - step
        at = segment * kv_heads + kv_head
        d_found = tl.load(d_kv + at * D * D + places)
        tl.store(d_kv + at * D * D + places, d_state)
        overlap = load_state(overlaps, at, D)
        if damping is not None:
            overlap = overlap * tl.load(damping + at)
        if TRANSPOSED:
            overlap = tl.trans(overlap)
        d_state += d_found - tl.dot(overlap, d_state, input_precision=PRECISION)
        d_state = tl.where(tl.load(starts + segment) != 0, 0.0, d_state)
    tl.store(d_incoming + outer + places, d_state)


@triton.jit
def overlap_gradient_kernel(
    k,
    weight,
    kv,
    norm,
    damping,
    d_kv,
    both,
    d_norm,
    k_segment,
    k_row,
    k_head,
    n,
    kv_heads,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Computes `both`, the gradient of O / damping plus its transpose.

    There is one program per key-value head and segment. It also adds to d_norm the gradient that
    the norm before the segment gets through the overlap.

    k, weight, norm as in `overlap_kernel`; damping [segments, kv_heads]; kv [segments, kv_heads, D,
    D], the memory before each segment; d_kv of the same shape, the gradient of the memory after it;
    `both` of the same shape, in k's type; d_norm [segments, kv_heads, D].
    """
    kv_head = tl.program_id(0)
    segment = tl.program_id(1).to(tl.int64)
    at = segment * kv_heads + kv_head
    features = tl.arange(0, D)
    product = tl.zeros((D, D), tl.float32)
    for start in range(0, D, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        in_state = at * D * D + features[:, None] * D + columns[None, :]
        d_after = tl.load(d_kv + in_state).to(both.dtype.element_ty)
        found = tl.load(kv + in_state).to(both.dtype.element_ty)
        product = tl.dot(d_after, tl.trans(found), product, input_precision="ieee")
    own_both = (-tl.load(damping + at) * (product + tl.trans(product))).to(both.dtype.element_ty)
    tl.store(tile(both + at * D * D, features, D, D), own_both)

    own_norm = tl.load(norm + at * D + features)
    own_d_norm = tl.load(d_norm + at * D + features)
    for start in range(0, n, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        keys = load_rows(k + segment * k_segment + kv_head * k_head, rows, k_row, n, D)
        own_weight = tl.load(weight + at * n + rows, mask=rows < n, other=0.0)
        sigma_k = sigma(keys.to(tl.float32))
        d_sigma = tl.dot(sigma_k.to(keys.dtype), own_both, input_precision="ieee")
        _, d_read = gradient_of_read(sigma_k, d_sigma, own_weight, own_norm, EPSILON)
        own_d_norm += tl.sum(sigma_k * d_read[:, None], axis=0)
    tl.store(d_norm + at * D + features, own_d_norm)


@triton.jit
def gradient_of_read(sigma_k, d_sigma, weight, norm, EPSILON: tl.constexpr):
    """Returns the gradients of each row's weight and sigma(k) z from d_sigma = sigma(k) `both`."""
    reciprocal = reciprocal_read(sigma_k, norm, EPSILON)
    d_weight = tl.sum(d_sigma * sigma_k, axis=1) * reciprocal / 2
    return d_weight, -d_weight * weight * reciprocal
