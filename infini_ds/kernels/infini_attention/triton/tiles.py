"""What all kernels share: where a tile lies, the feature map, rotary positions.

Queries, keys and values lie as [segments, n, heads, d], batch and segments flattened, the last
size contiguous and the others with strides of their own, so that slices of one projection are
read in place. What only kernels hand to each other lies head by head, [segments, heads, n, d].
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
import triton
import triton.language as tl


@triton.jit
def tile(start, rows, row_stride, D: tl.constexpr):
    """Pointers to whole rows, [rows, D]."""
    return start + rows[:, None] * row_stride + tl.arange(0, D)[None, :]


@triton.jit
def load_rows(start, rows, row_stride, n, D: tl.constexpr, ENDS: tl.constexpr = True):
    """Rows of a tile, [rows, D]; zero from row n on, if the tile ENDS beyond it."""
    inside = rows[:, None] < n if ENDS else None
    return tl.load(tile(start, rows, row_stride, D), mask=inside, other=0.0 if ENDS else None)


@triton.jit
def load_state(kv, at, D: tl.constexpr):
    """The `at`-th matrix of a contiguous stack, [D, D] fp32."""
    return tl.load(tile(kv + at * D * D, tl.arange(0, D), D, D))


@triton.jit
def load_rotary(table, rows, n, HALF: tl.constexpr):
    """Rows of the cos or sin table [n, HALF], zero from row n on."""
    return load_rows(table, rows, HALF, n, HALF)


@triton.jit
def sigma(x):
    """The feature map of the memory, elu + 1, of fp32; its derivative is min(sigma(x), 1)."""
    return tl.exp(tl.minimum(x, 0.0)) + tl.maximum(x, 0.0)


@triton.jit
def rotate(x, cos, sin, ROWS: tl.constexpr, D: tl.constexpr):
    """Rotary positions in two halves; x [ROWS, D], cos and sin [ROWS, D / 2], all fp32.

    With -sin it turns back, which is the gradient.
    """
    first, second = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, D // 2)), (0, 2, 1)))
    turned = tl.join(first * cos - second * sin, second * cos + first * sin)
    return tl.reshape(tl.permute(turned, (0, 2, 1)), (ROWS, D))
