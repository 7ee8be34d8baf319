"""Gradients of the memory's read and write, token by token.

They are stored in dq, dk and dv, to which the gradients of local attention are added later. With g
the gate, and the products D_mem = dO A_mem, D_loc = dO A_dot and dO O summed over each row,
(1 - g) D_loc is computed as dO O - g D_mem, so that nothing is ever divided by 1 - g.
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
import triton
import triton.language as tl

from infini_ds.kernels.infini_attention.triton.attend import gate_of, gate_of_rows
from infini_ds.kernels.infini_attention.triton.delta import gradient_of_read, reciprocal_read
from infini_ds.kernels.infini_attention.triton.tiles import (
    load_rotary,
    load_rows,
    load_state,
    positions_of,
    rotate,
    sigma,
    tile,
)


@triton.jit
def read_gradient_kernel(
    q,
    kv,
    norm,
    beta,
    cos,
    sin,
    begins,
    lengths,
    out,
    d_out,
    rotated_q,
    dq,
    along,
    share,
    d_denominator,
    d_beta,
    q_segment,
    q_row,
    q_head,
    n,
    padded_n,
    heads,
    kv_heads,
    EPSILON: tl.constexpr,
    PACKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Computes the read's part of dq, and numbers of each query that later kernels need.

    There is one program per BLOCK_ROWS queries of one head of one segment.

    q, out, d_out, dq [segments, n, heads, D], all but q contiguous; kv, norm: the memories that
    the segments read; rotated_q [segments, heads, n, D]. For each query in fp32: `along` [segments,
    heads, padded_n] is (1 - g) D_loc; and, all [segments, heads, n], `share` is g / (sigma(q) z),
    `d_denominator` is the gradient of sigma(q) z, and d_beta is its part of the gradient of beta.
    If segments are PACKED, begins and lengths are as in `attend_kernel`.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    segment = tl.program_id(2).to(tl.int64)
    at = segment * kv_heads + head // (heads // kv_heads)
    row_at = (segment * heads + head) * n
    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < n
    places = tile((segment * n * heads + head) * D, rows, heads * D, D)

    gradient = tl.load(d_out + places, mask=inside[:, None], other=0.0)
    stored = load_state(kv, at, D).to(gradient.dtype)
    d_sigma = tl.dot(gradient, tl.trans(stored), input_precision="ieee")
    mixed = tl.load(out + places, mask=inside[:, None], other=0.0)
    d_total = tl.sum(gradient.to(tl.float32) * mixed.to(tl.float32), axis=1)
    queries = load_rows(q + segment * q_segment + head * q_head, rows, q_row, n, D)
    sigma_q = sigma(queries.to(tl.float32))
    own_norm = tl.load(norm + at * D + tl.arange(0, D))
    gate = gate_of(beta, head, own_norm)
    if PACKED:
        gate = gate_of_rows(gate, rows, lengths, segment)
    denominator = tl.maximum(tl.sum(sigma_q * own_norm[None, :], axis=1), EPSILON)
    d_memory = tl.sum(d_sigma * sigma_q, axis=1) / denominator
    own_along = d_total - gate * d_memory
    own_share = gate / denominator
    own_d_denominator = -own_share * d_memory
    d_sigma = d_sigma * own_share[:, None] + own_d_denominator[:, None] * own_norm[None, :]
    d_queries = d_sigma * tl.minimum(sigma_q, 1.0)
    tl.store(dq + places, d_queries.to(queries.dtype), mask=inside[:, None])
    tl.store(along + (segment * heads + head) * padded_n + rows, own_along, mask=inside)
    tl.store(share + row_at + rows, own_share, mask=inside)
    tl.store(d_denominator + row_at + rows, own_d_denominator, mask=inside)
    d_beta_rows = gate * ((1 - gate) * d_memory - own_along)
    tl.store(d_beta + row_at + rows, d_beta_rows, mask=inside)

    positions = positions_of(begins, segment, rows, n, PACKED)
    own_cos = load_rotary(cos, positions, n, D // 2)
    own_sin = load_rotary(sin, positions, n, D // 2)
    turned = rotate(queries.to(tl.float32), own_cos, own_sin, BLOCK_ROWS, D).to(queries.dtype)
    tl.store(tile(rotated_q + row_at * D, rows, D, D), turned, mask=inside[:, None])


@triton.jit
def write_gradient_kernel(
    k,
    v,
    weight,
    norm,
    both,
    d_kv,
    d_norm,
    cos,
    sin,
    begins,
    rotated_k,
    dk,
    dv,
    d_weight,
    k_segment,
    k_row,
    k_head,
    v_segment,
    v_row,
    v_head,
    n,
    kv_heads,
    EPSILON: tl.constexpr,
    DELTA: tl.constexpr,
    PACKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Computes the write's part of dk and dv, and d_weight.

    One program per BLOCK_ROWS keys of one key-value head of one segment goes through the memory's
    columns BLOCK_V at a time. The write is kv += (weight sigma(k))^T v and
    norm += sum of weight sigma(k), and the delta rule also subtracts O kv from kv.

    k, v, dk, dv [segments, n, kv_heads, D], the last two contiguous; weight, d_weight
    [segments, kv_heads, n] fp32; d_kv, d_norm: the gradients of the memory after each segment;
    rotated_k [segments, kv_heads, n, D]. The delta rule also reads the norm before each segment,
    and `both` from `overlap_gradient_kernel`. If segments are PACKED, begins is as in
    `attend_kernel`.
    """
    kv_head = tl.program_id(1)
    segment = tl.program_id(2).to(tl.int64)
    at = segment * kv_heads + kv_head
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < n
    own_k = k + segment * k_segment + kv_head * k_head
    keys = load_rows(own_k, rows, k_row, n, D)
    own_v = v + segment * v_segment + kv_head * v_head
    own_weight = tl.load(weight + at * n + rows, mask=inside, other=0.0)
    sigma_k = sigma(keys.to(tl.float32))
    weighted = (sigma_k * own_weight[:, None]).to(keys.dtype)
    d_weighted = tl.zeros((BLOCK_ROWS, D), tl.float32)
    if DELTA:
        d_overlap = tl.zeros((BLOCK_ROWS, D), tl.float32)
    for start in range(0, D, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        in_state = at * D * D + tl.arange(0, D)[:, None] * D + columns[None, :]
        d_stored = tl.load(d_kv + in_state).to(keys.dtype)
        own_places = (
            (segment * n * kv_heads + kv_head) * D + rows[:, None] * kv_heads * D + columns[None, :]
        )
        d_values = tl.dot(weighted, d_stored, input_precision="ieee")
        tl.store(dv + own_places, d_values.to(keys.dtype), mask=inside[:, None])
        values = tl.load(
            own_v + rows[:, None] * v_row + columns[None, :], mask=inside[:, None], other=0.0
        )
        if DELTA:
            part = tl.load(
                own_k + rows[:, None] * k_row + columns[None, :], mask=inside[:, None], other=0.0
            )
            part = sigma(part.to(tl.float32)).to(keys.dtype)
            own_both = tl.load(tile(both + at * D * D, columns, D, D))
            d_overlap = tl.dot(part, own_both, d_overlap, input_precision="ieee")
        d_weighted = tl.dot(values, tl.trans(d_stored), d_weighted, input_precision="ieee")
    d_weighted += tl.load(d_norm + at * D + tl.arange(0, D))[None, :]
    own_d_weight = tl.sum(d_weighted * sigma_k, axis=1)
    d_sigma = d_weighted * own_weight[:, None]
    if DELTA:
        own_norm = tl.load(norm + at * D + tl.arange(0, D))
        more, d_read = gradient_of_read(sigma_k, d_overlap, own_weight, own_norm, EPSILON)
        share = own_weight * reciprocal_read(sigma_k, own_norm, EPSILON)
        d_sigma += d_overlap * share[:, None] + d_read[:, None] * own_norm[None, :]
        own_d_weight += more
    tl.store(d_weight + at * n + rows, own_d_weight, mask=inside)
    d_keys = d_sigma * tl.minimum(sigma_k, 1.0)
    places = tile((segment * n * kv_heads + kv_head) * D, rows, kv_heads * D, D)
    tl.store(dk + places, d_keys.to(keys.dtype), mask=inside[:, None])

    positions = positions_of(begins, segment, rows, n, PACKED)
    own_cos = load_rotary(cos, positions, n, D // 2)
    own_sin = load_rotary(sin, positions, n, D // 2)
    turned = rotate(keys.to(tl.float32), own_cos, own_sin, BLOCK_ROWS, D).to(keys.dtype)
    tl.store(tile(rotated_k + at * n * D, rows, D, D), turned, mask=inside[:, None])
