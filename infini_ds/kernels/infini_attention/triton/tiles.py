"""Functions that all kernels share: addresses of tiles, the feature map, rotary positions.

Queries, keys and values are [segments, n, heads, d], with batch and segments flattened. Only the
last dimension has to be contiguous, so that slices of one projection are read in place. Tensors
that only pass from kernel to kernel are stored head by head, [segments, heads, n, d].
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
import triton
import triton.language as tl


@triton.jit
def tile(start, rows, row_stride, D: tl.constexpr):
    """Returns pointers to whole rows, [rows, D]."""
    return start + rows[:, None] * row_stride + tl.arange(0, D)[None, :]


@triton.jit
def load_rows(start, rows, row_stride, n, D: tl.constexpr, ENDS: tl.constexpr = True):
    """Loads the rows of a tile, [rows, D]; with ENDS, rows from n on are zero."""
    inside = rows[:, None] < n if ENDS else None
    return tl.load(tile(start, rows, row_stride, D), mask=inside, other=0.0 if ENDS else None)


@triton.jit
def load_state(kv, at, D: tl.constexpr):
    """Loads the `at`-th matrix of a contiguous stack, [D, D] fp32."""
    return tl.load(tile(kv + at * D * D, tl.arange(0, D), D, D))


@triton.jit
def load_rotary(table, rows, n, HALF: tl.constexpr):
    """Loads rows of the cos or sin table [n, HALF], zero from row n on."""
    return load_rows(table, rows, HALF, n, HALF)


@triton.jit
def sigma(x):
    """Computes the memory's feature map, elu + 1, in fp32; its derivative is min(sigma(x), 1)."""
    return tl.exp(tl.minimum(x, 0.0)) + tl.maximum(x, 0.0)


@triton.jit
def rotate(x, cos, sin, ROWS: tl.constexpr, D: tl.constexpr):
    """Applies rotary positions to two halves of x [ROWS, D], cos and sin [ROWS, D / 2], all fp32.

    With -sin the rotation is undone, which is also its gradient.
    """
    first, second = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, D // 2)), (0, 2, 1)))
    turned = tl.join(first * cos - second * sin, second * cos + first * sin)
    return tl.reshape(tl.permute(turned, (0, 2, 1)), (ROWS, D))
