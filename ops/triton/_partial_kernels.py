"""Partial attention: one head over the first P channels of a map, ReLU over all of them.

Tiles of scores are `(BLOCK_M, BLOCK_N)`, queries by keys; where keys and values get their gradient,
keys by queries. The forward pass keeps the logsumexp of every row, of which the backward kernels
compute the weights again.

Values are a tile of BLOCK_V channels and one of BLOCK_R, if P needs it: 72 are 64 + 16, not 128.
Stores write both tiles whole, with channels that pass where P ends, so that they stay aligned.
Strides of the inputs count units of ALIGN elements: so the compiler knows how wide to load.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._tokens import LN2, LOG2E, load_tokens, locate_tokens, store_tokens

# one compilation serves all of these
SIZES = ["H", "W", "qkv_b", "qkv_y", "qkv_x", "x_b", "x_y", "x_x"]


@triton.jit
def locate(image, n, H, W, stride_b, stride_y, stride_x, ALIGN: tl.constexpr):
    """`locate_tokens` for strides in units of ALIGN elements."""
    units, pixels, inside = locate_tokens(image, n, H, W, stride_b, stride_y, stride_x)
    return units * ALIGN, pixels, inside


@triton.jit
def load_values(
    qkv, at, inside, FIRST: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Values from channel FIRST on, a tile."""
    COUNT: tl.constexpr = P - FIRST if P - FIRST < BLOCK else BLOCK
    return load_tokens(qkv, None, 2 * D + FIRST, at, inside, COUNT, BLOCK)


@triton.jit
def store_values(
    qkv, at, inside, values,
    FIRST: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write values from channel FIRST on, a tile."""
    COUNT: tl.constexpr = P - FIRST if P - FIRST < BLOCK else BLOCK
    store_tokens(qkv, 2 * D + FIRST, at, inside, values, COUNT, BLOCK)


@triton.jit
def store_relu(
    values, x, out, x_at, out_at, inside,
    FIRST: tl.constexpr, P: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write channels from FIRST on, a tile: those below P of `values`, the others of x."""
    COUNT: tl.constexpr = C - FIRST if C - FIRST < BLOCK else BLOCK
    c = FIRST + tl.arange(0, BLOCK)
    if values is None:
        values = load_tokens(x, None, FIRST, x_at, inside, COUNT, BLOCK)
    elif P < FIRST + BLOCK:
        # from a multiple of 8 on, for wide loads
        mask = inside[:, None] & ((c >= P // 8 * 8) & (c < C))[None, :]
        passed = tl.load(x + x_at[:, None] + c[None, :], mask=mask, other=0.0)
        values = tl.where((c < P)[None, :], values, passed.to(tl.float32))
    # unlike a maximum, this lets NaN through
    values = tl.where(values < 0, 0.0, values)
    store_tokens(out, FIRST, out_at, inside, values, COUNT, BLOCK)


@triton.jit
def load_gradient(
    grad, out, grad_x, at, inside,
    FIRST: tl.constexpr, P: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient before the ReLU from channel FIRST on, a tile that is zero from P on; the output.

    What it is from P on is the gradient of x, and written.
    """
    c = FIRST + tl.arange(0, BLOCK)
    # a multiple of 8, for wide loads
    END: tl.constexpr = C if grad_x is not None or P > C // 8 * 8 else (P + 7) // 8 * 8
    COUNT: tl.constexpr = END - FIRST if END - FIRST < BLOCK else BLOCK
    g = load_tokens(grad, None, FIRST, at, inside, COUNT, BLOCK)
    o = load_tokens(out, None, FIRST, at, inside, COUNT, BLOCK)
    g = tl.where(o > 0, g, 0.0)
    if grad_x is not None:
        passed = tl.where((c < P)[None, :], 0.0, g)
        store_tokens(grad_x, FIRST, at, inside, passed, COUNT, BLOCK)
    if P < FIRST + BLOCK:
        g = tl.where((c < P)[None, :], g, 0.0)
    return g, o


@triton.jit(do_not_specialize=SIZES)
def partial_fwd_kernel(
    qkv,  # (B, H, W, 2D + P)
    x,  # (B, H, W, C)
    out,  # (B, H, W, C)
    lse,  # (B, H, W)
    qkv_b,
    qkv_y,
    qkv_x,
    x_b,
    x_y,
    x_x,
    H,
    W,
    scale,
    D: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(H * W, BLOCK_M)
    image = tl.program_id(0) // blocks
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    x_at, pixels, is_query = locate(image, m, H, W, x_b, x_y, x_x, ALIGN_X)
    for channel in tl.static_range(BLOCK_V + BLOCK_R, C, BLOCK_C):
        store_relu(None, x, out, x_at, pixels * C, is_query, channel, P, C, BLOCK_C)

    tokens, pixels, is_query = locate(image, m, H, W, qkv_b, qkv_y, qkv_x, ALIGN)
    q = load_tokens(qkv, None, 0, tokens, is_query, D, BLOCK_D)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    values = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    if BLOCK_R > 0:
        rest = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(0, H * W, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        keys, _pixels, is_key = locate(image, n, H, W, qkv_b, qkv_y, qkv_x, ALIGN)
        k = load_tokens(qkv, None, D, keys, is_key, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(weights, 1)
        weights = weights.to(k.dtype)
        v = load_values(qkv, keys, is_key, 0, D, P, BLOCK_V)
        values = values * rescale[:, None] + tl.dot(weights, v, input_precision=PRECISION)
        if BLOCK_R > 0:
            v_rest = load_values(qkv, keys, is_key, BLOCK_V, D, P, BLOCK_R)
            rest = rest * rescale[:, None] + tl.dot(weights, v_rest, input_precision=PRECISION)
        top = new_top
    tl.store(lse + pixels, (top + tl.log2(total)) * LN2, mask=is_query)
    values = values / total[:, None]
    store_relu(values, x, out, x_at, pixels * C, is_query, 0, P, C, BLOCK_V)
    if BLOCK_R > 0:
        rest = rest / total[:, None]
        store_relu(rest, x, out, x_at, pixels * C, is_query, BLOCK_V, P, C, BLOCK_R)


@triton.jit
def keys_by_queries(q, k, lse, scale, PRECISION: tl.constexpr):
    """Softmax weights of a tile, keys by queries."""
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
    return tl.exp2(scores - lse[None, :] * LOG2E)


@triton.jit(do_not_specialize=SIZES)
def partial_bwd_kernel(
    grad,  # (B, H, W, C)
    qkv,  # (B, H, W, 2D + P)
    out,  # (B, H, W, C)
    lse,  # (B, H, W)
    grad_qkv,  # (B, H, W, 2D + P)
    grad_x,  # (B, H, W, C)
    qkv_b,
    qkv_y,
    qkv_x,
    H,
    W,
    scale,
    D: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = tl.arange(0, BLOCK_N)
    tokens, pixels, inside = locate(tl.program_id(0), n, H, W, qkv_b, qkv_y, qkv_x, ALIGN)
    packed = pixels * (2 * D + P)
    for channel in tl.static_range(BLOCK_V + BLOCK_R, C, BLOCK_C):
        load_gradient(grad, out, grad_x, pixels * C, inside, channel, P, C, BLOCK_C)

    q = load_tokens(qkv, None, 0, tokens, inside, D, BLOCK_D)
    k = load_tokens(qkv, None, D, tokens, inside, D, BLOCK_D)
    row_lse = tl.load(lse + pixels, mask=inside, other=float("inf"))
    weights = keys_by_queries(q, k, row_lse, scale, PRECISION)
    # those of keys beyond the image are of any size
    weights = tl.where(inside[:, None], weights, 0.0)
    g, _o = load_gradient(grad, out, grad_x, pixels * C, inside, 0, P, C, BLOCK_V)
    dv = tl.dot(weights.to(g.dtype), g, input_precision=PRECISION)
    store_values(grad_qkv, packed, inside, dv, 0, D, P, BLOCK_V)
    v = load_values(qkv, tokens, inside, 0, D, P, BLOCK_V)
    da = tl.dot(v, tl.trans(g), input_precision=PRECISION)
    if BLOCK_R > 0:
        g, _o = load_gradient(grad, out, grad_x, pixels * C, inside, BLOCK_V, P, C, BLOCK_R)
        dv = tl.dot(weights.to(g.dtype), g, input_precision=PRECISION)
        store_values(grad_qkv, packed, inside, dv, BLOCK_V, D, P, BLOCK_R)
        v = load_values(qkv, tokens, inside, BLOCK_V, D, P, BLOCK_R)
        da += tl.dot(v, tl.trans(g), input_precision=PRECISION)
    ds = (weights * (da - tl.sum(weights * da, 0)[None, :])).to(q.dtype)
    dk = tl.dot(ds, q, input_precision=PRECISION) * scale
    store_tokens(grad_qkv, D, packed, inside, dk, D, BLOCK_D)
    dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION) * scale
    store_tokens(grad_qkv, 0, packed, inside, dq, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def partial_queries_kernel(
    grad,  # (B, H, W, C)
    qkv,  # (B, H, W, 2D + P)
    out,  # (B, H, W, C)
    lse,  # (B, H, W)
    delta,  # (B, H, W), written: rowsum(grad * out) over the attended channels
    grad_qkv,  # (B, H, W, 2D + P), the queries' part written
    grad_x,  # (B, H, W, C)
    qkv_b,
    qkv_y,
    qkv_x,
    H,
    W,
    scale,
    D: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(H * W, BLOCK_M)
    image = tl.program_id(0) // blocks
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens, pixels, is_query = locate(image, m, H, W, qkv_b, qkv_y, qkv_x, ALIGN)
    for channel in tl.static_range(BLOCK_V + BLOCK_R, C, BLOCK_C):
        load_gradient(grad, out, grad_x, pixels * C, is_query, channel, P, C, BLOCK_C)
    g, o = load_gradient(grad, out, grad_x, pixels * C, is_query, 0, P, C, BLOCK_V)
    row_delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    if BLOCK_R > 0:
        g_rest, o_rest = load_gradient(
            grad, out, grad_x, pixels * C, is_query, BLOCK_V, P, C, BLOCK_R
        )
        row_delta += tl.sum(g_rest.to(tl.float32) * o_rest.to(tl.float32), 1)
    tl.store(delta + pixels, row_delta, mask=is_query)

    row_lse = tl.load(lse + pixels, mask=is_query, other=float("inf"))
    q = load_tokens(qkv, None, 0, tokens, is_query, D, BLOCK_D)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, H * W, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        keys, _pixels, is_key = locate(image, n, H, W, qkv_b, qkv_y, qkv_x, ALIGN)
        k = load_tokens(qkv, None, D, keys, is_key, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        weights = tl.exp2(scores - row_lse[:, None] * LOG2E)
        # those of keys beyond the image are of any size
        weights = tl.where(is_key[None, :], weights, 0.0)
        v = load_values(qkv, keys, is_key, 0, D, P, BLOCK_V)
        da = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        if BLOCK_R > 0:
            v_rest = load_values(qkv, keys, is_key, BLOCK_V, D, P, BLOCK_R)
            da += tl.dot(g_rest, tl.trans(v_rest), input_precision=PRECISION)
        ds = weights * (da - row_delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    store_tokens(grad_qkv, 0, pixels * (2 * D + P), is_query, dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def partial_keys_kernel(
    grad,  # (B, H, W, C)
    qkv,  # (B, H, W, 2D + P)
    out,  # (B, H, W, C)
    lse,  # (B, H, W)
    delta,  # (B, H, W)
    grad_qkv,  # (B, H, W, 2D + P), the keys' and values' part written
    qkv_b,
    qkv_y,
    qkv_x,
    H,
    W,
    scale,
    D: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(H * W, BLOCK_N)
    image = tl.program_id(0) // blocks
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    keys, key_pixels, is_key = locate(image, n, H, W, qkv_b, qkv_y, qkv_x, ALIGN)
    k = load_tokens(qkv, None, D, keys, is_key, D, BLOCK_D)
    v = load_values(qkv, keys, is_key, 0, D, P, BLOCK_V)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if BLOCK_R > 0:
        v_rest = load_values(qkv, keys, is_key, BLOCK_V, D, P, BLOCK_R)
        dv_rest = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for first in range(0, H * W, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        tokens, pixels, is_query = locate(image, m, H, W, qkv_b, qkv_y, qkv_x, ALIGN)
        q = load_tokens(qkv, None, 0, tokens, is_query, D, BLOCK_D)
        row_lse = tl.load(lse + pixels, mask=is_query, other=float("inf"))
        row_delta = tl.load(delta + pixels, mask=is_query, other=0.0)
        weights = keys_by_queries(q, k, row_lse, scale, PRECISION)
        g, _o = load_gradient(grad, out, None, pixels * C, is_query, 0, P, C, BLOCK_V)
        dv += tl.dot(weights.to(g.dtype), g, input_precision=PRECISION)
        da = tl.dot(v, tl.trans(g), input_precision=PRECISION)
        if BLOCK_R > 0:
            g_rest, _o_rest = load_gradient(
                grad, out, None, pixels * C, is_query, BLOCK_V, P, C, BLOCK_R
            )
            dv_rest += tl.dot(weights.to(g.dtype), g_rest, input_precision=PRECISION)
            da += tl.dot(v_rest, tl.trans(g_rest), input_precision=PRECISION)
        ds = weights * (da - row_delta[None, :])
        dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    packed = key_pixels * (2 * D + P)
    store_tokens(grad_qkv, D, packed, is_key, dk * scale, D, BLOCK_D)
    store_values(grad_qkv, packed, is_key, dv, 0, D, P, BLOCK_V)
    if BLOCK_R > 0:
        store_values(grad_qkv, packed, is_key, dv_rest, BLOCK_V, D, P, BLOCK_R)
