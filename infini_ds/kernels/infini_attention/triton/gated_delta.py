"""The gated delta rule as one affine map per segment, see `chunk_walk`, and its gradient.

Tokens are taken in chunks. The error of a chunk's values V is E = V - K M, where M is the memory
before the chunk, and the memory after it is M + K^T R diag(w) E with the `inverse`
R = (I + tril(diag(w) K K^T, -1))^-1. Each column of M depends on the same column of V alone. With
M = 0 before the segment this gives B, and with the keys in the place of V it gives O.

For the gradients, the memories before and after all chunks are made again from those before and
after segments, and then every chunk is on its own. With G the gradient of the memory after the
chunk, X = R diag(w) E, and D = R^T K G, the gradient of w E: the gradient of V is diag(w) D, that
of M is G - K^T diag(w) D, and that of the system inside R is -tril(D X^T, -1).
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
import triton
import triton.language as tl

from infini_ds.kernels.infini_attention.triton.tiles import (
    gradient_of_unit,
    load_rotary,
    load_rows,
    positions_of,
    rotate,
    tile,
    unit_scale,
)


@triton.jit
def keys_kernel(
    k,
    weight,
    cos,
    sin,
    begins,
    keys,
    rotated,
    inverses,
    k_segment,
    k_row,
    k_head,
    n,
    kv_heads,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Computes what the other kernels need of keys, with one program per chunk of a key-value head.

    k [segments, n, kv_heads, D]; weight [segments, kv_heads, n] fp32; keys (K) and rotated, k with
    rotary positions, [segments, kv_heads, n, D]; inverses [segments, kv_heads, chunks, CHUNK,
    CHUNK]. Positions count from `begins`, as in `attend_kernel`, if segments are PACKED.
    """
    chunk = tl.program_id(0)
    kv_head = tl.program_id(1)
    segment = tl.program_id(2).to(tl.int64)
    at = segment * kv_heads + kv_head
    rows = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = rows < n
    own_k = load_rows(k + segment * k_segment + kv_head * k_head, rows, k_row, n, D)
    features = own_k.to(tl.float32)
    unit = (features * unit_scale(features)[:, None]).to(own_k.dtype)
    tl.store(tile(keys + at * n * D, rows, D, D), unit, mask=inside[:, None])

    positions = positions_of(begins, segment, rows, n, PACKED)
    own_cos = load_rotary(cos, positions, n, D // 2)
    own_sin = load_rotary(sin, positions, n, D // 2)
    turned = rotate(features, own_cos, own_sin, CHUNK, D).to(own_k.dtype)
    tl.store(tile(rotated + at * n * D, rows, D, D), turned, mask=inside[:, None])

    own_weight = tl.load(weight + at * n + rows, mask=inside, other=0.0)
    products = tl.dot(unit, tl.trans(unit), input_precision="ieee")
    system = below_diagonal(own_weight[:, None] * products, CHUNK)
    inverse = inverse_of(system, PRECISION, CHUNK).to(own_k.dtype)
    places = tl.arange(0, CHUNK)
    at_chunk = at * tl.num_programs(0) + chunk
    tl.store(tile(inverses + at_chunk * CHUNK * CHUNK, places, CHUNK, CHUNK), inverse)


@triton.jit
def below_diagonal(x, CHUNK: tl.constexpr):
    """Returns tril(x, -1) of x [CHUNK, CHUNK]."""
    places = tl.arange(0, CHUNK)
    return tl.where(places[:, None] > places[None, :], x, 0.0)


@triton.jit
def inverse_of(system, PRECISION: tl.constexpr, CHUNK: tl.constexpr):
    """Computes (I + system)^-1 of a system [CHUNK, CHUNK] that is zero from the diagonal on.

    Blocks of 16 on the diagonal are inverted row by row. With their inverses as `diagonal` and
    N = `diagonal` @ what is left of the system, the result is (I + N)^-1 `diagonal`. There are at
    most four blocks, so that N^4 = 0 and (I + N)^-1 = (I - N) (I + N^2).
    """
    tl.static_assert(CHUNK <= 64, "at most four blocks of 16")
    BLOCKS: tl.constexpr = CHUNK // 16
    blocks, row = tl.arange(0, BLOCKS), tl.arange(0, 16)
    same = blocks[:, None, None, None] == blocks[None, None, :, None]
    by_block = tl.reshape(system, (BLOCKS, 16, BLOCKS, 16))
    own = tl.sum(tl.where(same, by_block, 0.0), axis=2)  # [BLOCKS, 16, 16]
    unit = (row[:, None] == row[None, :]).to(tl.float32)[None, :, :]
    inverse = unit + tl.zeros((BLOCKS, 16, 16), tl.float32)
    for place in range(1, 16):
        here = (row == place)[None, :, None]
        factors = tl.sum(tl.where(here, own, 0.0), axis=1)  # [BLOCKS, 16]
        above = tl.sum(factors[:, :, None] * inverse, axis=1)  # [BLOCKS, 16]
        inverse -= tl.where(here, above[:, None, :], 0.0)
    spread = tl.where(same, inverse[:, :, None, :], 0.0)
    result = tl.reshape(spread, (CHUNK, CHUNK))
    if BLOCKS > 1:
        places = tl.arange(0, CHUNK)
        in_block = places[:, None] // 16 == places[None, :] // 16
        left = tl.where(in_block, 0.0, system)
        nilpotent = tl.dot(result, left, input_precision=PRECISION)
        square = tl.dot(nilpotent, nilpotent, input_precision=PRECISION)
        result += tl.dot(square, result, input_precision=PRECISION)
        result -= tl.dot(nilpotent, result, input_precision=PRECISION)
    return result


@triton.jit
def chunks_kernel(
    keys,
    inverses,
    weight,
    values,
    before,
    after,
    by_chunk,
    values_segment,
    values_row,
    values_head,
    n,
    kv_heads,
    KEEPS: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Goes through the chunks of each segment, with one program per part of the columns.

    Without KEEPS, it begins with M = 0 and computes `after`, M after the segment. With KEEPS, it
    begins with `before` and computes `by_chunk`, M before each chunk.

    keys, inverses, weight as in `keys_kernel`; values [segments, n, kv_heads, D]; before, after
    [segments, kv_heads, D, D] fp32; by_chunk [segments, kv_heads, chunks, D, D] in the keys' type.
    What is not used is None.
    """
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    kv_head = tl.program_id(1).to(tl.int64)  # a head's keys lie n D numbers apart
    segment = tl.program_id(2).to(tl.int64)
    at = segment * kv_heads + kv_head
    chunks = tl.cdiv(n, CHUNK)
    places = tl.arange(0, D)[:, None] * D + columns[None, :]
    own_values = values + segment * values_segment + kv_head * values_head
    state = tl.zeros((D, BLOCK_V), tl.float32)
    if KEEPS:
        state = tl.load(before + at * D * D + places)
    for chunk in range(chunks):
        rows = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = rows < n
        own_keys = load_rows(keys + at * n * D, rows, D, n, D)
        inverse = load_inverse(inverses, at * chunks + chunk, CHUNK)
        own_weight = tl.load(weight + at * n + rows, mask=inside, other=0.0)
        value = tl.load(
            own_values + rows[:, None] * values_row + columns[None, :],
            mask=inside[:, None], other=0.0,
        )  # fmt: skip
        found = state.to(own_keys.dtype)
        if KEEPS:
            tl.store(by_chunk + (at * chunks + chunk) * D * D + places, found)
        error = value.to(tl.float32) - tl.dot(own_keys, found, input_precision="ieee")
        weighted = (error * own_weight[:, None]).to(own_keys.dtype)
        new = tl.dot(inverse, weighted, input_precision="ieee").to(own_keys.dtype)
        state = tl.dot(tl.trans(own_keys), new, state, input_precision="ieee")
    if not KEEPS:
        tl.store(after + at * D * D + places, state)


@triton.jit
def load_inverse(inverses, at, CHUNK: tl.constexpr):
    """Loads R of the `at`-th chunk."""
    return tl.load(tile(inverses + at * CHUNK * CHUNK, tl.arange(0, CHUNK), CHUNK, CHUNK))


@triton.jit
def chunks_gradient_kernel(
    keys,
    inverses,
    weight,
    d_after,
    d_by_chunk,
    n,
    kv_heads,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Goes back through the chunks of each segment, with one program per part of the columns.

    It computes d_by_chunk, the gradient of the memory after each chunk, from d_after, that of the
    memory after each segment. Shapes are as in `chunks_kernel`.
    """
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    at = tl.program_id(2).to(tl.int64) * kv_heads + tl.program_id(1)
    chunks = tl.cdiv(n, CHUNK)
    places = tl.arange(0, D)[:, None] * D + columns[None, :]
    d_state = tl.load(d_after + at * D * D + places)
    for step in range(chunks):
        chunk = chunks - 1 - step
        rows = chunk * CHUNK + tl.arange(0, CHUNK)
        own_keys = load_rows(keys + at * n * D, rows, D, n, D)
        inverse = load_inverse(inverses, at * chunks + chunk, CHUNK)
        own_weight = tl.load(weight + at * n + rows, mask=rows < n, other=0.0)
        own_d_state = d_state.to(own_keys.dtype)
        tl.store(d_by_chunk + (at * chunks + chunk) * D * D + places, own_d_state)
        d_new = tl.dot(own_keys, own_d_state, input_precision="ieee").to(own_keys.dtype)
        d_weighted = tl.dot(tl.trans(inverse), d_new, input_precision="ieee")
        d_found = (d_weighted * -own_weight[:, None]).to(own_keys.dtype)
        d_state = tl.dot(tl.trans(own_keys), d_found, d_state, input_precision="ieee")


@triton.jit
def tokens_gradient_kernel(
    k,
    v,
    keys,
    inverses,
    weight,
    by_chunk,
    d_by_chunk,
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
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Computes the write's part of dk and dv, and d_weight, with one program per chunk of a
    key-value head, which goes through the memory's columns BLOCK_V at a time.

    Keys are loaded again wherever they are needed, to keep fewer registers.

    k, v, dk, dv [segments, n, kv_heads, D], the last two contiguous; d_weight
    [segments, kv_heads, n] fp32; the others are as in `chunks_kernel` and `chunks_gradient_kernel`.
    """
    chunk = tl.program_id(0)
    kv_head = tl.program_id(1)
    segment = tl.program_id(2).to(tl.int64)
    at = segment * kv_heads + kv_head
    at_chunk = at * tl.num_programs(0) + chunk
    rows = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = rows < n
    own_weight = tl.load(weight + at * n + rows, mask=inside, other=0.0)
    own_v = v + segment * v_segment + kv_head * v_head
    d_keys = tl.zeros((CHUNK, D), tl.float32)
    d_system = tl.zeros((CHUNK, CHUNK), tl.float32)
    own_d_weight = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, D, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        in_state = at_chunk * D * D + tl.arange(0, D)[:, None] * D + columns[None, :]
        own_keys = load_rows(keys + at * n * D, rows, D, n, D)
        inverse = load_inverse(inverses, at_chunk, CHUNK)
        found = tl.load(by_chunk + in_state)
        d_after = tl.load(d_by_chunk + in_state)
        values = tl.load(
            own_v + rows[:, None] * v_row + columns[None, :], mask=inside[:, None], other=0.0
        )
        error = values.to(tl.float32) - tl.dot(own_keys, found, input_precision="ieee")
        weighted = (error * own_weight[:, None]).to(own_keys.dtype)
        new = tl.dot(inverse, weighted, input_precision="ieee").to(own_keys.dtype)
        d_new = tl.dot(own_keys, d_after, input_precision="ieee").to(own_keys.dtype)
        d_weighted = tl.dot(tl.trans(inverse), d_new, input_precision="ieee")
        own_d_weight += tl.sum(d_weighted * error, axis=1)
        d_system = tl.dot(
            d_weighted.to(own_keys.dtype), tl.trans(new), d_system, input_precision="ieee"
        )
        d_values = d_weighted * own_weight[:, None]
        places = (
            (segment * n * kv_heads + kv_head) * D + rows[:, None] * kv_heads * D + columns[None, :]
        )
        tl.store(dv + places, d_values.to(own_keys.dtype), mask=inside[:, None])
        d_keys = tl.dot(new, tl.trans(d_after), d_keys, input_precision="ieee")
        d_found = (-d_values).to(own_keys.dtype)
        d_keys = tl.dot(d_found, tl.trans(found), d_keys, input_precision="ieee")
    d_system = below_diagonal(-d_system, CHUNK)
    own_keys = load_rows(keys + at * n * D, rows, D, n, D)
    products = tl.dot(own_keys, tl.trans(own_keys), input_precision="ieee")
    own_d_weight += tl.sum(d_system * products, axis=1)
    tl.store(d_weight + at * n + rows, own_d_weight, mask=inside)
    d_system = d_system * own_weight[:, None]
    d_products = (d_system + tl.trans(d_system)).to(own_keys.dtype)
    d_keys = tl.dot(d_products, own_keys, d_keys, input_precision="ieee")
    own_k = load_rows(k + segment * k_segment + kv_head * k_head, rows, k_row, n, D)
    d_k = gradient_of_unit(own_k.to(tl.float32), d_keys)
    places = tile((segment * n * kv_heads + kv_head) * D, rows, kv_heads * D, D)
    tl.store(dk + places, d_k.to(own_k.dtype), mask=inside[:, None])
