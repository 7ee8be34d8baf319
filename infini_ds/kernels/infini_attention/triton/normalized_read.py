"""Gradient of the gated delta rule's read, q M over its root mean square, token by token.

As in `memory_gradient`, the gradients of local attention are added to dq later.
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
import triton
import triton.language as tl

from infini_ds.kernels.infini_attention.triton.attend import gate_of, gate_of_rows
from infini_ds.kernels.infini_attention.triton.tiles import (
    READ_EPSILON,
    gradient_of_unit,
    load_rotary,
    load_rows,
    load_state,
    positions_of,
    rotate,
    tile,
    unit_scale,
)


@triton.jit
def normalized_read_gradient_kernel(
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
    d_read,
    along,
    d_beta,
    q_segment,
    q_row,
    q_head,
    n,
    padded_n,
    heads,
    kv_heads,
    PACKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Computes the read's part of dq, the gradient of q M, and numbers of each query.

    There is one program per BLOCK_ROWS queries of one head of one segment. The arguments are as in
    `read_gradient_kernel`, and d_read [segments, heads, n, D] is the gradient of q M. Queries are
    loaded again wherever they are needed, to keep fewer registers.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    segment = tl.program_id(2).to(tl.int64)
    at = segment * kv_heads + head // (heads // kv_heads)
    row_at = (segment * heads + head) * n
    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < n
    places = tile((segment * n * heads + head) * D, rows, heads * D, D)

    own_q = q + segment * q_segment + head * q_head
    queries = load_rows(own_q, rows, q_row, n, D)
    features = queries.to(tl.float32)
    unit = (features * unit_scale(features)[:, None]).to(queries.dtype)
    stored = load_state(kv, at, D).to(queries.dtype)
    found = tl.dot(unit, stored, input_precision="ieee")
    scale = tl.rsqrt(tl.sum(found * found, axis=1) / D + READ_EPSILON)
    gradient = tl.load(d_out + places, mask=inside[:, None], other=0.0).to(tl.float32)
    mixed = tl.load(out + places, mask=inside[:, None], other=0.0)
    d_total = tl.sum(gradient * mixed.to(tl.float32), axis=1)
    gate = gate_of(beta, head, tl.load(norm + at * D + tl.arange(0, D)))
    if PACKED:
        gate = gate_of_rows(gate, rows, lengths, segment)
    found = found * scale[:, None]
    d_memory = tl.sum(gradient * found, axis=1)
    own_along = d_total - gate * d_memory
    d_found = (gate * scale)[:, None] * (gradient - found * (d_memory / D)[:, None])
    own_d_read = d_found.to(queries.dtype)
    tl.store(tile(d_read + row_at * D, rows, D, D), own_d_read, mask=inside[:, None])
    tl.store(along + (segment * heads + head) * padded_n + rows, own_along, mask=inside)
    d_beta_rows = gate * ((1 - gate) * d_memory - own_along)
    tl.store(d_beta + row_at + rows, d_beta_rows, mask=inside)
    d_unit = tl.dot(own_d_read, tl.trans(stored), input_precision="ieee")
    queries = load_rows(own_q, rows, q_row, n, D)
    d_queries = gradient_of_unit(queries.to(tl.float32), d_unit)
    tl.store(dq + places, d_queries.to(queries.dtype), mask=inside[:, None])

    positions = positions_of(begins, segment, rows, n, PACKED)
    own_cos = load_rotary(cos, positions, n, D // 2)
    own_sin = load_rotary(sin, positions, n, D // 2)
    queries = load_rows(own_q, rows, q_row, n, D)
    turned = rotate(queries.to(tl.float32), own_cos, own_sin, BLOCK_ROWS, D).to(queries.dtype)
    tl.store(tile(rotated_q + row_at * D, rows, D, D), turned, mask=inside[:, None])


@triton.jit
def read_sums_kernel(
    q,
    d_read,
    d_found,
    q_segment,
    q_row,
    q_head,
    n,
    kv_heads,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Sums the features of q times d_read over all queries of a memory: its gradient, fp32.

    One program per part of the columns, key-value head and segment goes through the rows of all
    GROUP heads of its key-value head.

    q [segments, n, kv_heads GROUP, D]; d_read [segments, kv_heads GROUP, n, D]; d_found
    [segments, kv_heads, D, D].
    """
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    kv_head = tl.program_id(1)
    segment = tl.program_id(2).to(tl.int64)
    total = tl.zeros((D, BLOCK_V), tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        own_q = q + segment * q_segment + head * q_head
        own_d_read = d_read + (segment * kv_heads * GROUP + head) * n * D
        for start in range(0, n, BLOCK_ROWS):
            rows = start + tl.arange(0, BLOCK_ROWS)
            features = load_rows(own_q, rows, q_row, n, D).to(tl.float32)
            gradient = tl.load(
                own_d_read + rows[:, None] * D + columns[None, :],
                mask=(rows < n)[:, None], other=0.0,
            )  # fmt: skip
            unit = (features * unit_scale(features)[:, None]).to(gradient.dtype)
            total = tl.dot(tl.trans(unit), gradient, total, input_precision="ieee")
    places = tl.arange(0, D)[:, None] * D + columns[None, :]
    tl.store(d_found + (segment * kv_heads + kv_head) * D * D + places, total)
