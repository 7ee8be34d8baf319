"""Functions that all kernels share: addresses of tiles, the feature map, rotary positions.

Queries, keys and values are [segments, n, heads, d], with batch and segments flattened. Only the
last dimension has to be contiguous, so that slices of one projection are read in place. Tensors
that only pass from kernel to kernel are stored head by head, [segments, heads, n, d].
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
import triton
import triton.language as tl

from infini_ds.memory import gated_delta

KEY_EPSILON = tl.constexpr(gated_delta.KEY_EPSILON)
READ_EPSILON = tl.constexpr(gated_delta.READ_EPSILON)


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
def load_begins(begins, segment, rows, n):
    """Where the document of each row begins, of begins [segments, n]; 0 from row n on."""
    return tl.load(begins + segment * n + rows, mask=rows < n, other=0)


@triton.jit
def positions_of(begins, segment, rows, n, PACKED: tl.constexpr):
    """Rotary positions, which count from the beginning of a row's document."""
    positions = rows
    if PACKED:
        positions = rows - load_begins(begins, segment, rows, n)
    return positions


@triton.jit
def tiles_with_begins(begins, segment, first, last, n, BLOCK_N: tl.constexpr):
    """From and up to which key some of the rows first to last see a key and others do not.

    Both are multiples of BLOCK_N, as `first` is. All rows see what lies between the second and
    `first`, and none sees what lies before the first, since begins never fall along a segment.
    These keys are taken together with those of the diagonal, by `key_tile`.
    """
    lowest = tl.load(begins + segment * n + first)
    highest = tl.load(begins + segment * n + last - 1)
    mixed_up_to = tl.minimum(tl.cdiv(highest, BLOCK_N) * BLOCK_N, first)
    return lowest // BLOCK_N * BLOCK_N, mixed_up_to


@triton.jit
def key_tile(start, diagonal, gap, BEGINS: tl.constexpr):
    """The first key of a tile that is masked: the tiles just before the diagonal stand for those
    where documents begin, which lie `gap` further ahead."""
    place = start
    if BEGINS:
        place = tl.where(start < diagonal, start - gap, start)
    return place


@triton.jit
def earlier_tiles(earlier_rows, segment, first, width, BLOCK_N: tl.constexpr):
    """From and up to which key of the segment before the rows from `first` on see any.

    Row i sees none before key i + 1. None at all are seen behind the segment's `earlier_rows`.
    """
    some = tl.load(earlier_rows + segment) > first
    return first // BLOCK_N * BLOCK_N, tl.where(some, width, 0)


@triton.jit
def load_ends(ends, columns, width):
    """Before which row each key of the segment before is seen, of ends [width]; 0 from there on."""
    return tl.load(ends + columns, mask=columns < width, other=0)


@triton.jit
def sigma(x):
    """Computes the memory's feature map, elu + 1, in fp32; its derivative is min(sigma(x), 1)."""
    return tl.exp(tl.minimum(x, 0.0)) + tl.maximum(x, 0.0)


@triton.jit
def unit_scale(x):
    """One over the length of each row; the gated delta rule's features are their product."""
    return tl.rsqrt(tl.sum(x * x, axis=1) + KEY_EPSILON)


@triton.jit
def gradient_of_unit(x, d_unit):
    """Returns the gradient of x from that of its features, all fp32."""
    scale = unit_scale(x)
    along = tl.sum(x * d_unit, axis=1) * scale * scale
    return (d_unit - x * along[:, None]) * scale[:, None]


@triton.jit
def rotate(x, cos, sin, ROWS: tl.constexpr, D: tl.constexpr):
    """Applies rotary positions to two halves of x [ROWS, D], cos and sin [ROWS, D / 2], all fp32.

    With -sin the rotation is undone, which is also its gradient.
    """
    first, second = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, D // 2)), (0, 2, 1)))
    turned = tl.join(first * cos - second * sin, second * cos + first * sin)
    return tl.reshape(tl.permute(turned, (0, 2, 1)), (ROWS, D))
