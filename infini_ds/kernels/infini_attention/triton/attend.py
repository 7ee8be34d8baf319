"""Local attention, the read of the memory and their mix in one pass, eq. (3) and (6)."""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
import triton
import triton.language as tl

from infini_ds.kernels.infini_attention.triton.tiles import (
    READ_EPSILON,
    earlier_tiles,
    key_tile,
    load_begins,
    load_ends,
    load_rotary,
    load_rows,
    positions_of,
    rotate,
    sigma,
    tile,
    tiles_with_begins,
    unit_scale,
)

LOWEST = tl.constexpr(-3.0e38)
"""Below every score, and finite: a row may see no key of a tile."""


@triton.jit
def gate_of(beta, head, norm):
    """Returns the memory's share in a head, 0 if nothing is stored, that is if norm [D] is zero."""
    gate = tl.sigmoid(tl.load(beta + head).to(tl.float32))
    return tl.where(tl.sum(norm, axis=0) > 0, gate, 0.0)


@triton.jit
def gate_of_rows(gate, rows, lengths, segment):
    """The same of each row in a packed segment, whose first document alone reads the memory."""
    return tl.where(rows < tl.load(lengths + segment), gate, 0.0)


@triton.jit
def scale_of_read(queries, kv, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns what q kv is multiplied by so that features are of length 1 and reads are
    RMS-normalised, by row.

    The read itself is not kept, since it would need as many registers as attention does.
    """
    features = queries.to(tl.float32)
    length = unit_scale(features)
    unit = (features * length[:, None]).to(queries.dtype)
    square = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        places = tl.arange(0, D)[:, None] * D + columns[None, :]
        found = tl.dot(unit, tl.load(kv + places).to(queries.dtype), input_precision="ieee")
        square += tl.sum(found * found, axis=1)
    return length * tl.rsqrt(square / D + READ_EPSILON)


@triton.jit
def attend_to_keys(
    rotated_q,
    rotated_k,
    v,
    v_row,
    rows,
    begins,
    first,
    last,
    diagonal,
    gap,
    ends,
    n,
    scale,
    highest,
    total,
    mixed,
    DIAGONAL: tl.constexpr,
    BEGINS: tl.constexpr,
    EARLIER: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Accumulates softmax attention over keys first to last of n (Dao 2023, FlashAttention-2).

    On the diagonal a query sees the keys up to its own position, and before the diagonal all keys.
    If documents begin here, it sees those from the begin of its own document on, and `key_tile`
    tells the keys. EARLIER keys are those of the segment before, each seen by the rows before its
    end. Returns each row's highest score, sum of weights, and weighted sum of values.
    """
    for start in range(first, last, BLOCK_N):
        columns = key_tile(start, diagonal, gap, BEGINS) + tl.arange(0, BLOCK_N)
        keys = load_rows(rotated_k, columns, D, n, D, DIAGONAL or EARLIER)
        values = load_rows(v, columns, v_row, n, D, DIAGONAL or EARLIER)
        scores = tl.dot(rotated_q, tl.trans(keys), input_precision="ieee") * scale
        if DIAGONAL:
            seen = (columns[None, :] <= rows[:, None]) & (columns[None, :] < n)
            if BEGINS:
                seen = seen & (columns[None, :] >= begins[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        if EARLIER:
            seen = rows[:, None] < load_ends(ends, columns, n)[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        raised = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - raised[:, None])
        faded = tl.exp2(highest - raised)
        total = total * faded + tl.sum(weights, axis=1)
        mixed = tl.dot(
            weights.to(values.dtype), values, mixed * faded[:, None], input_precision="ieee"
        )
        highest = raised
    return highest, total, mixed


@triton.jit
def attend_kernel(
    q,
    rotated_k,
    v,
    kv,
    norm,
    beta,
    cos,
    sin,
    begins,
    lengths,
    earlier_k,
    earlier_v,
    earlier_ends,
    earlier_rows,
    out,
    log_sum,
    q_segment,
    q_row,
    q_head,
    v_segment,
    v_row,
    v_head,
    n,
    padded_n,
    width,
    heads,
    kv_heads,
    scale,
    EPSILON: tl.constexpr,
    NORMALIZED: tl.constexpr,
    PACKED: tl.constexpr,
    SLIDING: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes attention, with one program per BLOCK_M queries of one head of one segment.

    Programs with the most keys come first.

    q [segments, n, heads, D]; rotated_k [segments, kv_heads, n, D]; v [segments, n, kv_heads, D];
    kv, norm: the memories that the segments read, as in `window.States`; out [segments, n, heads,
    D]; log_sum [segments, heads, padded_n] fp32, base 2, whose rows from n on are left as they are.
    `scale` is log2(e) / sqrt(D), because weights are powers of two. By the gated delta rule, reads
    are NORMALIZED instead of divided by the norm. If segments are PACKED, there are begins
    [segments, n] of each row's document and lengths [segments] of the first documents, int32. If
    the window is SLIDING, queries also attend to the segment before, as in `Earlier`.
    """
    tl.static_assert(BLOCK_M % BLOCK_N == 0, "whole tiles of keys before the diagonal")
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    segment = tl.program_id(2).to(tl.int64)
    kv_head = head // (heads // kv_heads)
    at = segment * kv_heads + kv_head
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n
    own_q = q + segment * q_segment + head * q_head
    queries = load_rows(own_q, rows, q_row, n, D)
    own_norm = tl.load(norm + at * D + tl.arange(0, D))
    gate = gate_of(beta, head, own_norm)
    if PACKED:
        gate = gate_of_rows(gate, rows, lengths, segment)
    if NORMALIZED:
        share = gate * scale_of_read(queries, kv + at * D * D, D, BLOCK_M, BLOCK_D)
    else:
        sigma_q = sigma(queries.to(tl.float32))
        share = gate / tl.maximum(tl.sum(sigma_q * own_norm[None, :], axis=1), EPSILON)
    positions = positions_of(begins, segment, rows, n, PACKED)
    own_cos = load_rotary(cos, positions, n, D // 2)
    own_sin = load_rotary(sin, positions, n, D // 2)
    rotated_q = rotate(queries.to(tl.float32), own_cos, own_sin, BLOCK_M, D).to(queries.dtype)
    own_k = rotated_k + at * n * D
    own_v = v + segment * v_segment + kv_head * v_head

    highest = tl.full((BLOCK_M,), LOWEST if PACKED or SLIDING else float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, D), tl.float32)
    first, last = block * BLOCK_M, tl.minimum((block + 1) * BLOCK_M, n)
    own_begins, whole, masked = rows, 0, first
    if PACKED:
        own_begins = load_begins(begins, segment, rows, n)
        seen, whole = tiles_with_begins(begins, segment, first, last, n, BLOCK_N)
        masked = first - (whole - seen)
    if SLIDING:
        seen_from, seen_to = earlier_tiles(earlier_rows, segment, first, width, BLOCK_N)
        highest, total, mixed = attend_to_keys(
            rotated_q, earlier_k + at * width * D, earlier_v + at * width * D, D, rows, own_begins,
            seen_from, seen_to, first, 0, earlier_ends + segment * width, width, scale, highest,
            total, mixed, False, False, True, D, BLOCK_N,
        )  # fmt: skip
    highest, total, mixed = attend_to_keys(
        rotated_q, own_k, own_v, v_row, rows, own_begins, whole, first, first, 0, None, n, scale,
        highest, total, mixed, False, False, False, D, BLOCK_N,
    )  # fmt: skip
    highest, total, mixed = attend_to_keys(
        rotated_q, own_k, own_v, v_row, rows, own_begins, masked, last, first, first - whole, None,
        n, scale, highest, total, mixed, True, PACKED, False, D, BLOCK_N,
    )  # fmt: skip

    # The memory is read by parts of the features, to need few registers besides those of `mixed`.
    mixed = mixed * ((1 - gate) / total)[:, None]
    features_read = D
    if PACKED:  # none behind the first document
        features_read = tl.where(first < tl.load(lengths + segment), D, 0)
    for start in range(0, features_read, BLOCK_D):
        features = start + tl.arange(0, BLOCK_D)
        own_queries = tl.load(
            own_q + rows[:, None] * q_row + features[None, :], mask=inside[:, None], other=0.0
        )
        if NORMALIZED:
            own_features = own_queries.to(tl.float32)
        else:
            own_features = sigma(own_queries.to(tl.float32))
        reading = (own_features * share[:, None]).to(queries.dtype)
        stored = tl.load(tile(kv + at * D * D, features, D, D)).to(queries.dtype)
        mixed = tl.dot(reading, stored, mixed, input_precision="ieee")
    places = tile(out + (segment * n * heads + head) * D, rows, heads * D, D)
    tl.store(places, mixed.to(queries.dtype), mask=inside[:, None])
    own_log_sum = log_sum + (segment * heads + head) * padded_n + rows
    tl.store(own_log_sum, highest + tl.log2(total), mask=inside)
