"""Gradients of local attention from recomputed scores (Dao 2023, FlashAttention-2).

After the rotary positions are undone, they are added to the gradients of the memory's read and
write in dq, dk and dv. `along` is the (1 - g) D_loc of `memory_gradient`.
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
import triton
import triton.language as tl

from infini_ds.kernels.infini_attention.triton.attend import gate_of, gate_of_rows
from infini_ds.kernels.infini_attention.triton.tiles import (
    earlier_tiles,
    key_tile,
    load_begins,
    load_ends,
    load_rotary,
    load_rows,
    positions_of,
    rotate,
    tile,
    tiles_with_begins,
)


@triton.jit
def query_gradient_kernel(
    rotated_q,
    rotated_k,
    v,
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
    d_out,
    log_sum,
    along,
    dq,
    v_segment,
    v_row,
    v_head,
    n,
    padded_n,
    width,
    heads,
    kv_heads,
    scale,
    LN_2: tl.constexpr,
    PACKED: tl.constexpr,
    SLIDING: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds to dq, with one program per BLOCK_M queries of one head of one segment.

    Programs with the most keys come first. Shapes, and keys of a SLIDING window, are as in
    `attend_kernel` and `read_gradient_kernel`.
    """
    tl.static_assert(BLOCK_M % BLOCK_N == 0, "whole tiles of keys before the diagonal")
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    segment = tl.program_id(2).to(tl.int64)
    kv_head = head // (heads // kv_heads)
    at = segment * kv_heads + kv_head
    row_at = (segment * heads + head) * padded_n
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n
    places = tile((segment * n * heads + head) * D, rows, heads * D, D)
    gate = gate_of(beta, head, tl.load(norm + at * D + tl.arange(0, D)))
    if PACKED:
        gate = gate_of_rows(gate, rows, lengths, segment)[:, None]
    queries = load_rows(rotated_q + (segment * heads + head) * n * D, rows, D, n, D)
    gradient = tl.load(d_out + places, mask=inside[:, None], other=0.0)
    own_log_sum = tl.load(log_sum + row_at + rows)
    own_along = tl.load(along + row_at + rows)
    own_k = rotated_k + at * n * D
    own_v = v + segment * v_segment + kv_head * v_head
    d_turned = tl.zeros((BLOCK_M, D), tl.float32)
    first, last = block * BLOCK_M, tl.minimum((block + 1) * BLOCK_M, n)
    own_begins, whole, masked = rows, 0, first
    if PACKED:
        own_begins = load_begins(begins, segment, rows, n)
        seen, whole = tiles_with_begins(begins, segment, first, last, n, BLOCK_N)
        masked = first - (whole - seen)
    if SLIDING:
        seen_from, seen_to = earlier_tiles(earlier_rows, segment, first, width, BLOCK_N)
        d_turned = gradient_of_queries(
            queries, earlier_k + at * width * D, earlier_v + at * width * D, D, gradient,
            own_log_sum, own_along, gate, rows, own_begins, seen_from, seen_to, first, 0,
            earlier_ends + segment * width, width, scale, d_turned, False, False, True, D, BLOCK_N,
        )  # fmt: skip
    d_turned = gradient_of_queries(
        queries, own_k, own_v, v_row, gradient, own_log_sum, own_along, gate, rows, own_begins,
        whole, first, first, 0, None, n, scale, d_turned, False, False, False, D, BLOCK_N,
    )  # fmt: skip
    d_turned = gradient_of_queries(
        queries, own_k, own_v, v_row, gradient, own_log_sum, own_along, gate, rows, own_begins,
        masked, last, first, first - whole, None, n, scale, d_turned, True, PACKED, False, D,
        BLOCK_N,
    )  # fmt: skip
    positions = positions_of(begins, segment, rows, n, PACKED)
    own_cos = load_rotary(cos, positions, n, D // 2)
    own_sin = load_rotary(sin, positions, n, D // 2)
    d_queries = rotate(d_turned * (scale * LN_2), own_cos, -own_sin, BLOCK_M, D)
    d_queries += tl.load(dq + places, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(dq + places, d_queries.to(queries.dtype), mask=inside[:, None])


@triton.jit
def gradient_of_queries(
    rotated_q,
    rotated_k,
    v,
    v_row,
    gradient,
    log_sum,
    along,
    gate,
    rows,
    begins,
    first,
    last,
    diagonal,
    gap,
    ends,
    n,
    scale,
    d_turned,
    DIAGONAL: tl.constexpr,
    BEGINS: tl.constexpr,
    EARLIER: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the part of keys first to last in the rotated queries' gradient, times sqrt(D).

    Keys are as in `attend_to_keys`. If segments are packed, `gate` is [rows, 1].
    """
    for start in range(first, last, BLOCK_N):
        columns = key_tile(start, diagonal, gap, BEGINS) + tl.arange(0, BLOCK_N)
        keys = load_rows(rotated_k, columns, D, n, D, DIAGONAL or EARLIER)
        values = load_rows(v, columns, v_row, n, D, DIAGONAL or EARLIER)
        scores = tl.dot(rotated_q, tl.trans(keys), input_precision="ieee")
        weights = tl.exp2(scores * scale - log_sum[:, None])
        if DIAGONAL:
            seen = columns[None, :] <= rows[:, None]
            if BEGINS:
                seen = seen & (columns[None, :] >= begins[:, None])
            weights = tl.where(seen, weights, 0.0)
        if EARLIER:
            seen = rows[:, None] < load_ends(ends, columns, n)[None, :]
            weights = tl.where(seen, weights, 0.0)
        d_weights = tl.dot(gradient, tl.trans(values), input_precision="ieee")
        d_scores = weights * (d_weights * (1 - gate) - along[:, None])
        d_turned = tl.dot(d_scores.to(keys.dtype), keys, d_turned, input_precision="ieee")
    return d_turned


@triton.jit
def key_gradient_kernel(
    rotated_q,
    rotated_k,
    v,
    norm,
    beta,
    cos,
    sin,
    begins,
    ends,
    lengths,
    d_out,
    log_sum,
    along,
    dk,
    dv,
    v_segment,
    v_row,
    v_head,
    n,
    padded_n,
    kv_heads,
    scale,
    LN_2: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds to dk and dv, with one program per BLOCK_N keys of one key-value head of one segment.

    Programs with the most queries come first. Shapes are as in `attend_kernel`,
    `read_gradient_kernel` and `write_gradient_kernel`. If segments are PACKED, `ends` [segments, n]
    int32 is the position after the last row of each key's document. Two accumulators leave few
    registers, so there is a single loop, which does nothing that can be done elsewhere.
    """
    first = tl.program_id(0) * BLOCK_N
    kv_head = tl.program_id(1)
    segment = tl.program_id(2).to(tl.int64)
    at = segment * kv_heads + kv_head
    columns = first + tl.arange(0, BLOCK_N)
    inside = columns < n
    places = tile((segment * n * kv_heads + kv_head) * D, columns, kv_heads * D, D)
    own_norm = tl.load(norm + at * D + tl.arange(0, D))
    keys = load_rows(rotated_k + at * n * D, columns, D, n, D)
    values = load_rows(v + segment * v_segment + kv_head * v_head, columns, v_row, n, D)
    d_values = tl.load(dv + places, mask=inside[:, None], other=0.0).to(tl.float32)
    d_turned = tl.zeros((BLOCK_N, D), tl.float32)
    own_ends, length, last = columns, n, n
    if PACKED:
        own_ends = tl.load(ends + segment * n + columns, mask=inside, other=0)
        length = tl.load(lengths + segment)
        last = tl.load(ends + segment * n + tl.minimum(first + BLOCK_N, n) - 1)
    d_turned, d_values = gradient_of_group(
        rotated_q, keys, values, d_out, log_sum, along, beta, own_norm, segment, kv_head, kv_heads,
        columns, own_ends, length, first, last, n, padded_n, scale, d_turned, d_values, GROUP, True,
        PACKED, D, BLOCK_M,
    )  # fmt: skip
    tl.store(dv + places, d_values.to(values.dtype), mask=inside[:, None])
    positions = positions_of(begins, segment, columns, n, PACKED)
    own_cos = load_rotary(cos, positions, n, D // 2)
    own_sin = load_rotary(sin, positions, n, D // 2)
    d_keys = rotate(d_turned * (scale * LN_2), own_cos, -own_sin, BLOCK_N, D)
    d_keys += tl.load(dk + places, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(dk + places, d_keys.to(keys.dtype), mask=inside[:, None])


@triton.jit
def earlier_gradient_kernel(
    rotated_q,
    earlier_k,
    earlier_v,
    earlier_ends,
    norm,
    beta,
    lengths,
    d_out,
    log_sum,
    along,
    d_earlier_k,
    d_earlier_v,
    n,
    padded_n,
    width,
    kv_heads,
    scale,
    LN_2: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes the gradients of the segment before, with one program per BLOCK_N of its keys and
    key-value head.

    Shapes are as in `key_gradient_kernel` and `Earlier`. The keys' gradient is that of keys with
    rotary positions.
    """
    first = tl.program_id(0) * BLOCK_N
    kv_head = tl.program_id(1)
    segment = tl.program_id(2).to(tl.int64)
    at = segment * kv_heads + kv_head
    columns = first + tl.arange(0, BLOCK_N)
    own_norm = tl.load(norm + at * D + tl.arange(0, D))
    keys = load_rows(earlier_k + at * width * D, columns, D, width, D)
    values = load_rows(earlier_v + at * width * D, columns, D, width, D)
    ends = load_ends(earlier_ends + segment * width, columns, width)
    last, length = tl.max(ends, axis=0), n
    if PACKED:
        length = tl.load(lengths + segment)
    d_values = tl.zeros((BLOCK_N, D), tl.float32)
    d_turned = tl.zeros((BLOCK_N, D), tl.float32)
    d_turned, d_values = gradient_of_group(
        rotated_q, keys, values, d_out, log_sum, along, beta, own_norm, segment, kv_head, kv_heads,
        columns, ends, length, 0, last, n, padded_n, scale, d_turned, d_values, GROUP, False, True,
        D, BLOCK_M,
    )  # fmt: skip
    places, inside = tile(at * width * D, columns, D, D), columns < width
    d_keys = d_turned * (scale * LN_2)
    tl.store(d_earlier_k + places, d_keys.to(keys.dtype), mask=inside[:, None])
    tl.store(d_earlier_v + places, d_values.to(values.dtype), mask=inside[:, None])


@triton.jit
def gradient_of_group(
    rotated_q,
    keys,
    values,
    d_out,
    log_sum,
    along,
    beta,
    norm,
    segment,
    kv_head,
    kv_heads,
    columns,
    ends,
    length,
    first,
    last,
    n,
    padded_n,
    scale,
    d_turned,
    d_values,
    GROUP: tl.constexpr,
    DIAGONAL: tl.constexpr,
    ENDS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Adds what `gradient_of_keys` does for each of the GROUP heads of a key-value head."""
    for member in range(GROUP):
        head = kv_head * GROUP + member
        gate = gate_of(beta, head, norm)
        row_at = (segment * kv_heads * GROUP + head) * padded_n
        own_q = rotated_q + (segment * kv_heads * GROUP + head) * n * D
        own_gradient = d_out + (segment * n * kv_heads * GROUP + head) * D
        gradient_row = kv_heads * GROUP * D
        d_turned, d_values = gradient_of_keys(
            own_q, keys, values, own_gradient, gradient_row, log_sum + row_at, along + row_at,
            gate, columns, ends, length, first, last, n, scale, d_turned, d_values, DIAGONAL, ENDS,
            D, BLOCK_M,
        )  # fmt: skip
    return d_turned, d_values


@triton.jit
def gradient_of_keys(
    rotated_q,
    rotated_k,
    values,
    d_out,
    d_out_row,
    log_sum,
    along,
    gate,
    columns,
    ends,
    length,
    first,
    last,
    n,
    scale,
    d_turned,
    d_values,
    DIAGONAL: tl.constexpr,
    ENDS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Adds the part of queries first to last in the gradients of rotated keys and of values.

    On the DIAGONAL a key is seen from its own position on. With ENDS it is seen by the rows before
    its end, and only rows before `length` read the memory. The keys' gradient is times sqrt(D).
    Scores are transposed, [keys, queries]. Tiles of queries begin at multiples of BLOCK_M, so that
    none reaches beyond the padded rows.
    """
    for start in range(first // BLOCK_M * BLOCK_M, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        queries = load_rows(rotated_q, rows, D, n, D)
        gradient = load_rows(d_out, rows, d_out_row, n, D)
        own_log_sum = tl.load(log_sum + rows)
        own_along = tl.load(along + rows)
        scores = tl.dot(rotated_k, tl.trans(queries), input_precision="ieee")
        weights = tl.exp2(scores * scale - own_log_sum[None, :])
        own_gate = gate
        if DIAGONAL:
            seen = columns[:, None] <= rows[None, :]
            if ENDS:
                seen = seen & (rows[None, :] < ends[:, None])
        else:
            seen = rows[None, :] < ends[:, None]
        weights = tl.where(seen, weights, 0.0)
        if ENDS:
            own_gate = tl.where(rows < length, gate, 0.0)[None, :]
        weights_left = (weights * (1 - own_gate)).to(gradient.dtype)
        d_values = tl.dot(weights_left, gradient, d_values, input_precision="ieee")
        d_weights = tl.dot(values, tl.trans(gradient), input_precision="ieee")
        d_scores = weights * (d_weights * (1 - own_gate) - own_along[None, :])
        d_turned = tl.dot(d_scores.to(queries.dtype), queries, d_turned, input_precision="ieee")
    return d_turned, d_values
