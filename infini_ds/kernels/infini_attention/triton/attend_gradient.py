"""Gradients of local attention from recomputed scores (Dao 2023, FlashAttention-2).

After the rotary positions are undone, they are added to the gradients of the memory's read and
write in dq, dk and dv. `along` is the (1 - g) D_loc of `memory_gradient`.
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
import triton
import triton.language as tl

from infini_ds.kernels.infini_attention.triton.attend import gate_of
from infini_ds.kernels.infini_attention.triton.tiles import load_rotary, load_rows, rotate, tile


@triton.jit
def query_gradient_kernel(
    rotated_q,
    rotated_k,
    v,
    norm,
    beta,
    cos,
    sin,
    d_out,
    log_sum,
    along,
    dq,
    v_segment,
    v_row,
    v_head,
    n,
    padded_n,
    heads,
    kv_heads,
    scale,
    LN_2: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds to dq, with one program per BLOCK_M queries of one head of one segment.

    Programs with the most keys come first. Shapes are as in `attend_kernel` and
    `read_gradient_kernel`.
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
    queries = load_rows(rotated_q + (segment * heads + head) * n * D, rows, D, n, D)
    gradient = tl.load(d_out + places, mask=inside[:, None], other=0.0)
    own_log_sum = tl.load(log_sum + row_at + rows)
    own_along = tl.load(along + row_at + rows)
    own_k = rotated_k + at * n * D
    own_v = v + segment * v_segment + kv_head * v_head
    d_turned = tl.zeros((BLOCK_M, D), tl.float32)
    first, last = block * BLOCK_M, tl.minimum((block + 1) * BLOCK_M, n)
    d_turned = gradient_of_queries(
        queries, own_k, own_v, v_row, gradient, own_log_sum, own_along, gate, rows,
        0, first, n, scale, d_turned, False, D, BLOCK_N,
    )  # fmt: skip
    d_turned = gradient_of_queries(
        queries, own_k, own_v, v_row, gradient, own_log_sum, own_along, gate, rows,
        first, last, n, scale, d_turned, True, D, BLOCK_N,
    )  # fmt: skip
    own_cos, own_sin = load_rotary(cos, rows, n, D // 2), load_rotary(sin, rows, n, D // 2)
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
    first,
    last,
    n,
    scale,
    d_turned,
    DIAGONAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the part of keys first to last in the rotated queries' gradient, times sqrt(D)."""
    for start in range(first, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        keys = load_rows(rotated_k, columns, D, n, D, DIAGONAL)
        values = load_rows(v, columns, v_row, n, D, DIAGONAL)
        scores = tl.dot(rotated_q, tl.trans(keys), input_precision="ieee")
        weights = tl.exp2(scores * scale - log_sum[:, None])
        if DIAGONAL:
            weights = tl.where(columns[None, :] <= rows[:, None], weights, 0.0)
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
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds to dk and dv, with one program per BLOCK_N keys of one key-value head of one segment.

    Programs with the most queries come first. Shapes are as in `attend_kernel`,
    `read_gradient_kernel` and `write_gradient_kernel`. Two accumulators leave few registers, so
    there is a single loop, which does nothing that can be done elsewhere.
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
    for member in range(GROUP):
        head = kv_head * GROUP + member
        gate = gate_of(beta, head, own_norm)
        row_at = (segment * kv_heads * GROUP + head) * padded_n
        own_q = rotated_q + (segment * kv_heads * GROUP + head) * n * D
        own_gradient = d_out + (segment * n * kv_heads * GROUP + head) * D
        gradient_row = kv_heads * GROUP * D
        d_turned, d_values = gradient_of_keys(
            own_q, keys, values, own_gradient, gradient_row, log_sum + row_at, along + row_at,
            gate, columns, first, n, scale, d_turned, d_values, D, BLOCK_M,
        )  # fmt: skip
    tl.store(dv + places, d_values.to(values.dtype), mask=inside[:, None])
    own_cos, own_sin = load_rotary(cos, columns, n, D // 2), load_rotary(sin, columns, n, D // 2)
    d_keys = rotate(d_turned * (scale * LN_2), own_cos, -own_sin, BLOCK_N, D)
    d_keys += tl.load(dk + places, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(dk + places, d_keys.to(keys.dtype), mask=inside[:, None])


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
    first,
    n,
    scale,
    d_turned,
    d_values,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Adds the part of queries from `first` on in the gradients of rotated keys and of values.

    The keys' gradient is times sqrt(D). Scores are transposed, [keys, queries]. Tiles of queries
    begin at multiples of BLOCK_M, so that none reaches beyond the padded rows.
    """
    for start in range(first // BLOCK_M * BLOCK_M, n, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        queries = load_rows(rotated_q, rows, D, n, D)
        gradient = load_rows(d_out, rows, d_out_row, n, D)
        own_log_sum = tl.load(log_sum + rows)
        own_along = tl.load(along + rows)
        scores = tl.dot(rotated_k, tl.trans(queries), input_precision="ieee")
        weights = tl.exp2(scores * scale - own_log_sum[None, :])
        weights = tl.where(columns[:, None] <= rows[None, :], weights, 0.0)
        weights_left = (weights * (1 - gate)).to(gradient.dtype)
        d_values = tl.dot(weights_left, gradient, d_values, input_precision="ieee")
        d_weights = tl.dot(values, tl.trans(gradient), input_precision="ieee")
        d_scores = weights * (d_weights * (1 - gate) - own_along[None, :])
        d_turned = tl.dot(d_scores.to(queries.dtype), queries, d_turned, input_precision="ieee")
    return d_turned, d_values
