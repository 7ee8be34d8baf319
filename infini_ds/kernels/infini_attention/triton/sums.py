"""Sums over a segment's tokens: what the segment writes, or the gradient of the memory it read."""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
import triton
import triton.language as tl

from infini_ds.kernels.infini_attention.triton.tiles import (
    load_rotary,
    load_rows,
    positions_of,
    rotate,
    sigma,
    tile,
)


@triton.jit
def sums_kernel(
    x,
    y,
    weight,
    norm_weight,
    kv,
    norm,
    rotated,
    cos,
    sin,
    begins,
    x_segment,
    x_row,
    x_head,
    y_segment,
    y_row,
    y_head,
    n,
    kv_heads,
    GROUP: tl.constexpr,
    ROTATES: tl.constexpr,
    PACKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Computes kv = (weight sigma(x))^T y and norm = sum of norm_weight sigma(x), in fp32.

    One program per part of the columns of y, key-value head and segment goes through the rows of
    all GROUP heads of its key-value head.

    x, y [segments, n, kv_heads GROUP, D]; weight, norm_weight [segments, kv_heads GROUP, n] fp32;
    kv [segments, kv_heads, D, D]; norm [segments, kv_heads, D]. If ROTATES is set, x with rotary
    positions is stored too, since x is read anyway, in rotated [segments, kv_heads GROUP, n, D].
    Positions count from `begins`, as in `attend_kernel`, if segments are PACKED.
    """
    part = tl.program_id(0)
    kv_head = tl.program_id(1)
    segment = tl.program_id(2).to(tl.int64)
    columns = part * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros((D, BLOCK_V), tl.float32)
    norm_total = tl.zeros((D,), tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        own_x = x + segment * x_segment + head * x_head
        own_y = y + segment * y_segment + head * y_head
        own_weights = (segment * kv_heads * GROUP + head) * n
        for start in range(0, n, BLOCK_ROWS):
            rows = start + tl.arange(0, BLOCK_ROWS)
            inside = rows < n
            features = load_rows(own_x, rows, x_row, n, D).to(tl.float32)
            if ROTATES and part == 0:
                positions = positions_of(begins, segment, rows, n, PACKED)
                own_cos = load_rotary(cos, positions, n, D // 2)
                own_sin = load_rotary(sin, positions, n, D // 2)
                turned = rotate(features, own_cos, own_sin, BLOCK_ROWS, D).to(y.dtype.element_ty)
                places = tile(rotated + own_weights * D, rows, D, D)
                tl.store(places, turned, mask=inside[:, None])
            sigma_x = sigma(features)
            values = tl.load(
                own_y + rows[:, None] * y_row + columns[None, :], mask=inside[:, None], other=0.0
            )
            scale = tl.load(weight + own_weights + rows, mask=inside, other=0.0)
            norm_scale = tl.load(norm_weight + own_weights + rows, mask=inside, other=0.0)
            weighted = (sigma_x * scale[:, None]).to(values.dtype)
            total = tl.dot(tl.trans(weighted), values, total, input_precision="ieee")
            norm_total += tl.sum(sigma_x * norm_scale[:, None], axis=0)
    at = segment * kv_heads + kv_head
    places = tl.arange(0, D)
    tl.store(kv + at * D * D + places[:, None] * D + columns[None, :], total)
    if part == 0:
        tl.store(norm + at * D + places, norm_total)
