"""Window attention in tiles of queries and keys, for windows of more than 64 tokens.

Tiles of scores are `(BLOCK_M, BLOCK_N)`, queries by keys. The forward pass keeps the logsumexp of
every row, of which all three backward kernels compute the weights again.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._tokens import LN2, LOG2E, load_tokens, store_tokens
from ._window_tokens import hide, load_bias, locate

# one compilation serves all of these
SIZES = ["H", "W", "rows", "cols", "windows", "table_h", "table_y", "table_x"]


@triton.jit(do_not_specialize=SIZES)
def window_tiled_fwd_kernel(
    qkv,  # (B, H, W, 3C)
    table,  # (heads, 2P - 1, 2Q - 1) or None
    pad,  # (3C,) or None
    out,  # (B, H, W, C)
    lse,  # (B, H, W, heads)
    stride_b,
    stride_y,
    stride_x,
    table_h,
    table_y,
    table_x,
    H,
    W,
    rows,
    cols,
    scale,
    C,
    part,
    step,
    D: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    GRID: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks: tl.constexpr = (P * Q + BLOCK_M - 1) // BLOCK_M
    heads = C // D
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(0) // blocks % heads
    window = tl.program_id(0) // (blocks * heads)
    start = head * step
    if table is not None:
        table += head * table_h

    tokens, pixels, is_query = locate(
        window, m, H, W, rows, cols, stride_b, stride_y, stride_x, P, Q, GRID
    )
    q = load_tokens(qkv, pad, start, tokens, is_query, D, BLOCK_D)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    values = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, P * Q, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        keys, _, is_key = locate(
            window, n, H, W, rows, cols, stride_b, stride_y, stride_x, P, Q, GRID
        )
        k = load_tokens(qkv, pad, start + part, keys, is_key, D, BLOCK_D)
        v = load_tokens(qkv, pad, start + 2 * part, keys, is_key, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        scores += load_bias(table, table_y, table_x, m, n, P, Q, BLOCK_M, BLOCK_N)
        scores = hide(scores, float("-inf"), n, is_key, pad, P * Q, BLOCK_N, RAGGED)
        # finite from the first tile on: the first token of a window is never hidden
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(weights, 1)
        values = values * rescale[:, None]
        values += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = new_top
    store_tokens(out, head * D, pixels * C, is_query, values / total[:, None], D, BLOCK_D)
    tl.store(lse + pixels * heads + head, (top + tl.log2(total)) * LN2, mask=is_query)


@triton.jit
def weights_and_ds(
    q, k, v, g, bias, lse, delta, n, is_key, pad, scale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax weights of a tile of scores, and the gradient of the scores."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
    weights = tl.exp2(scores - lse[:, None] * LOG2E)
    weights = hide(weights, 0.0, n, is_key, pad, N, BLOCK_N, RAGGED)
    da = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    return weights, weights * (da - delta[:, None])


@triton.jit(do_not_specialize=SIZES)
def window_tiled_queries_kernel(
    grad,  # (B, H, W, C)
    qkv,  # (B, H, W, 3C)
    table,  # (heads, 2P - 1, 2Q - 1) or None
    pad,  # (3C,) or None
    out,  # (B, H, W, C)
    lse,  # (B, H, W, heads)
    delta,  # (B, H, W, heads), written: rowsum(grad * out)
    grad_qkv,  # (B, H, W, 3C), the queries' part written
    stride_b,
    stride_y,
    stride_x,
    table_h,
    table_y,
    table_x,
    H,
    W,
    rows,
    cols,
    scale,
    C,
    part,
    step,
    D: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    GRID: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks: tl.constexpr = (P * Q + BLOCK_M - 1) // BLOCK_M
    heads = C // D
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(0) // blocks % heads
    window = tl.program_id(0) // (blocks * heads)
    start = head * step
    if table is not None:
        table += head * table_h

    tokens, pixels, is_query = locate(
        window, m, H, W, rows, cols, stride_b, stride_y, stride_x, P, Q, GRID
    )
    q = load_tokens(qkv, pad, start, tokens, is_query, D, BLOCK_D)
    g = load_tokens(grad, None, head * D, pixels * C, is_query, D, BLOCK_D)
    o = load_tokens(out, None, head * D, pixels * C, is_query, D, BLOCK_D)
    row_delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + pixels * heads + head, row_delta, mask=is_query)
    row_lse = tl.load(lse + pixels * heads + head, mask=is_query, other=float("inf"))
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, P * Q, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        keys, _, is_key = locate(
            window, n, H, W, rows, cols, stride_b, stride_y, stride_x, P, Q, GRID
        )
        k = load_tokens(qkv, pad, start + part, keys, is_key, D, BLOCK_D)
        v = load_tokens(qkv, pad, start + 2 * part, keys, is_key, D, BLOCK_D)
        bias = load_bias(table, table_y, table_x, m, n, P, Q, BLOCK_M, BLOCK_N)
        _, ds = weights_and_ds(
            q, k, v, g, bias, row_lse, row_delta, n, is_key, pad, scale,
            P * Q, BLOCK_N, RAGGED, PRECISION,
        )  # fmt: skip
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    store_tokens(grad_qkv, start, pixels * 3 * C, is_query, dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def window_tiled_keys_kernel(
    grad,  # (B, H, W, C)
    qkv,  # (B, H, W, 3C)
    table,  # (heads, 2P - 1, 2Q - 1) or None
    pad,  # (3C,) or None
    lse,  # (B, H, W, heads)
    delta,  # (B, H, W, heads)
    grad_qkv,  # (B, H, W, 3C), the keys' and values' part written
    grad_bias,  # (groups, heads, N, N), or None; only if one tile holds all queries
    grad_pad,  # (groups, blocks, 3C) or None
    stride_b,
    stride_y,
    stride_x,
    table_h,
    table_y,
    table_x,
    H,
    W,
    rows,
    cols,
    windows,
    scale,
    C,
    part,
    step,
    D: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    GRID: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    N: tl.constexpr = P * Q
    heads = C // D
    block, head, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    start = head * step
    if table is not None:
        table += head * table_h
    if BLOCK_M >= N:
        bias = load_bias(table, table_y, table_x, tl.arange(0, BLOCK_M), n, P, Q, BLOCK_M, BLOCK_N)
    sum_ds = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    pad_dk = tl.zeros((BLOCK_D,), tl.float32)
    pad_dv = tl.zeros((BLOCK_D,), tl.float32)
    for window in range(group, windows, tl.num_programs(2)):
        keys, key_pixels, inside = locate(
            window, n, H, W, rows, cols, stride_b, stride_y, stride_x, P, Q, GRID
        )
        k = load_tokens(qkv, pad, start + part, keys, inside, D, BLOCK_D)
        v = load_tokens(qkv, pad, start + 2 * part, keys, inside, D, BLOCK_D)
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for first in range(0, N, BLOCK_M):
            m = first + tl.arange(0, BLOCK_M)
            tokens, pixels, is_query = locate(
                window, m, H, W, rows, cols, stride_b, stride_y, stride_x, P, Q, GRID
            )
            q = load_tokens(qkv, pad, start, tokens, is_query, D, BLOCK_D)
            g = load_tokens(grad, None, head * D, pixels * C, is_query, D, BLOCK_D)
            rows_at = pixels * heads + head
            row_lse = tl.load(lse + rows_at, mask=is_query, other=float("inf"))
            row_delta = tl.load(delta + rows_at, mask=is_query, other=0.0)
            if BLOCK_M < N:
                bias = load_bias(table, table_y, table_x, m, n, P, Q, BLOCK_M, BLOCK_N)
            weights, ds = weights_and_ds(
                q, k, v, g, bias, row_lse, row_delta, n, inside, pad, scale,
                N, BLOCK_N, RAGGED, PRECISION,
            )  # fmt: skip
            dv += tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision=PRECISION)
            dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
            if grad_bias is not None:
                sum_ds += ds
        dk *= scale
        store_tokens(grad_qkv, start + part, key_pixels * 3 * C, inside, dk, D, BLOCK_D)
        store_tokens(grad_qkv, start + 2 * part, key_pixels * 3 * C, inside, dv, D, BLOCK_D)
        if grad_pad is not None:
            outside = (~inside & (n < N))[:, None]
            pad_dk += tl.sum(tl.where(outside, dk, 0.0), 0)
            pad_dv += tl.sum(tl.where(outside, dv, 0.0), 0)
    if grad_bias is not None:
        m = tl.arange(0, BLOCK_M)
        pairs = ((group * heads + head) * N + m[:, None]) * N + n[None, :]
        tl.store(grad_bias + pairs, sum_ds, mask=(m < N)[:, None] & (n < N)[None, :])
    if grad_pad is not None:
        row = grad_pad + (group * tl.num_programs(0) + block) * 3 * C + start + d
        tl.store(row, tl.zeros((BLOCK_D,), tl.float32), mask=d < D)
        tl.store(row + part, pad_dk, mask=d < D)
        tl.store(row + 2 * part, pad_dv, mask=d < D)


@triton.jit(do_not_specialize=SIZES)
def window_tiled_bias_kernel(
    grad,  # (B, H, W, C)
    qkv,  # (B, H, W, 3C)
    table,  # (heads, 2P - 1, 2Q - 1)
    pad,  # (3C,) or None
    lse,  # (B, H, W, heads)
    delta,  # (B, H, W, heads)
    grad_bias,  # (groups, heads, N, N)
    stride_b,
    stride_y,
    stride_x,
    table_h,
    table_y,
    table_x,
    H,
    W,
    rows,
    cols,
    windows,
    scale,
    C,
    part,
    step,
    D: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    GRID: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    N: tl.constexpr = P * Q
    heads = C // D
    blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    head, group = tl.program_id(1), tl.program_id(2)
    m = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    start = head * step
    table += head * table_h
    bias = load_bias(table, table_y, table_x, m, n, P, Q, BLOCK_M, BLOCK_N)
    sum_ds = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for window in range(group, windows, tl.num_programs(2)):
        keys, _, is_key = locate(
            window, n, H, W, rows, cols, stride_b, stride_y, stride_x, P, Q, GRID
        )
        k = load_tokens(qkv, pad, start + part, keys, is_key, D, BLOCK_D)
        v = load_tokens(qkv, pad, start + 2 * part, keys, is_key, D, BLOCK_D)
        tokens, pixels, is_query = locate(
            window, m, H, W, rows, cols, stride_b, stride_y, stride_x, P, Q, GRID
        )
        q = load_tokens(qkv, pad, start, tokens, is_query, D, BLOCK_D)
        g = load_tokens(grad, None, head * D, pixels * C, is_query, D, BLOCK_D)
        rows_at = pixels * heads + head
        row_lse = tl.load(lse + rows_at, mask=is_query, other=float("inf"))
        row_delta = tl.load(delta + rows_at, mask=is_query, other=0.0)
        _, ds = weights_and_ds(
            q, k, v, g, bias, row_lse, row_delta, n, is_key, pad, scale,
            P * Q, BLOCK_N, RAGGED, PRECISION,
        )  # fmt: skip
        sum_ds += ds
    pairs = ((group * heads + head) * N + m[:, None]) * N + n[None, :]
    tl.store(grad_bias + pairs, sum_ds, mask=(m < N)[:, None] & (n < N)[None, :])
