"""Neighborhood attention, backward: a kernel of query tiles, then one of key tiles.

Tiles are those of `_neighborhood_kernels.py`. The first kernel goes through the keys of its
queries, the second through the queries of its keys; both compute the weights again, from the
logsumexp. Every gradient is written by one program.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._neighborhood_kernels import (
    NOWHERE,
    SIZES,
    are_neighbors,
    blocks_in,
    keys_of,
    load_channels,
    locate_block,
    locate_tile,
    products,
    queries_of,
    store_channels,
    window_start,
)
from ._tokens import LOG2E, fit_along


@triton.jit
def load_delta(g, grad, out, at, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Products of gradients and outputs, of which `g` are the first channels of the gradients."""
    if D <= BLOCK_D:
        o = load_channels(out, at, inside, 0, D, BLOCK_D)
        delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    else:
        delta = tl.zeros((at.shape[0],), tl.float32)
        for first in range(0, D, BLOCK_D):
            some = load_channels(grad, at, inside, first, D, BLOCK_D)
            o = load_channels(out, at, inside, first, D, BLOCK_D)
            delta += tl.sum(some.to(tl.float32) * o.to(tl.float32), 1)
    return delta


@triton.jit(do_not_specialize=SIZES)
def neighborhood_bwd_queries_kernel(
    grad,  # (B, H, W, C), contiguous
    qkv,  # (B, H, W, 3C)
    out,  # (B, H, W, C), contiguous
    lse,  # (B, heads, H, W), base 2
    delta,  # (B, heads, H, W), written: products of gradients and outputs
    grad_qkv,  # (B, H, W, 3C), contiguous, the queries' part written
    stride_b,
    stride_y,
    stride_x,
    heads,
    H,
    W,
    dilation_y,
    dilation_x,
    blocks_y,
    blocks_x,
    period,
    shift_0,
    shift_1,
    shift_2,
    shift_3,
    scale,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CLAMP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a tile of queries, BLOCK_D channels."""
    problem, rows, cols, first_y, first_x = locate_tile(
        heads, H, W, dilation_y, dilation_x, blocks_y, blocks_x,
        period, shift_0, shift_1, shift_2, shift_3, TILE,
    )  # fmt: skip
    batch, head = problem // heads, problem % heads
    C = heads * D
    part = tl.program_id(1) * BLOCK_D
    queries = qkv + batch * stride_b + head * D
    keys, values = queries + C, queries + 2 * C
    y, x, is_query, image_y, image_x = locate_block(0, 1, first_y, first_x, rows, cols, TILE, TILE)
    at = image_y * stride_y + image_x * stride_x
    pixels = image_y * W + image_x
    grads = grad + batch * H * W * C + head * D
    q = load_channels(queries, at, is_query, 0, D, BLOCK_D)
    g = load_channels(grads, pixels * C, is_query, 0, D, BLOCK_D)
    outs = out + batch * H * W * C + head * D
    row_delta = load_delta(g, grads, outs, pixels * C, is_query, D, BLOCK_D)
    if part == 0:
        tl.store(delta + problem * H * W + pixels, row_delta, mask=is_query)
    row_lse = tl.load(lse + problem * H * W + pixels, mask=is_query, other=float("inf"))
    start_y, start_x = window_start(y, rows, ROWS, CLAMP), window_start(x, cols, COLS, CLAMP)

    dq = tl.zeros((TILE * TILE, BLOCK_D), tl.float32)
    upper, lower = keys_of(first_y, rows, ROWS, CLAMP, TILE)
    left, right = keys_of(first_x, cols, COLS, CLAMP, TILE)
    across = blocks_in(left, right, BLOCK_X, TILE + COLS - 1)
    for step in range(0, (lower - upper + BLOCK_Y - 1) // BLOCK_Y * across):
        key_y, key_x, is_key, key_row, key_col = locate_block(
            step, across, upper, left, rows, cols, BLOCK_Y, BLOCK_X
        )
        keys_at = key_row * stride_y + key_col * stride_x
        scores = products(q, queries, at, is_query, keys, keys_at, is_key, D, BLOCK_D, PRECISION)
        key_y = tl.where(is_key, key_y, NOWHERE)
        seen = are_neighbors(
            key_y[None, :], key_x[None, :], start_y[:, None], start_x[:, None], ROWS, COLS
        )
        scores = tl.where(seen, scores * (scale * LOG2E), float("-inf"))
        weights = tl.exp2(scores - row_lse[:, None])
        da = products(
            g, grads, pixels * C, is_query, values, keys_at, is_key, D, BLOCK_D, PRECISION
        )
        k = load_channels(keys, keys_at, is_key, part, D, BLOCK_D)
        ds, unit = fit_along(weights * (da - row_delta[:, None]), 1, k.dtype)
        dq += tl.dot(ds, k, input_precision=PRECISION) * unit
    into = grad_qkv + batch * H * W * (3 * C) + head * D
    store_channels(into, pixels * (3 * C), is_query, part, dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def neighborhood_bwd_keys_kernel(
    grad,  # (B, H, W, C), contiguous
    qkv,  # (B, H, W, 3C)
    lse,  # (B, heads, H, W), base 2
    delta,  # (B, heads, H, W)
    grad_qkv,  # (B, H, W, 3C), contiguous, the keys' and values' part written
    stride_b,
    stride_y,
    stride_x,
    heads,
    H,
    W,
    dilation_y,
    dilation_x,
    blocks_y,
    blocks_x,
    period,
    shift_0,
    shift_1,
    shift_2,
    shift_3,
    scale,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CLAMP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a tile of keys and values, BLOCK_D channels; scores are keys by queries."""
    problem, rows, cols, first_y, first_x = locate_tile(
        heads, H, W, dilation_y, dilation_x, blocks_y, blocks_x,
        period, shift_0, shift_1, shift_2, shift_3, TILE,
    )  # fmt: skip
    batch, head = problem // heads, problem % heads
    C = heads * D
    part = tl.program_id(1) * BLOCK_D
    queries = qkv + batch * stride_b + head * D
    keys, values = queries + C, queries + 2 * C
    y, x, is_key, image_y, image_x = locate_block(0, 1, first_y, first_x, rows, cols, TILE, TILE)
    at = image_y * stride_y + image_x * stride_x
    grads = grad + batch * H * W * C + head * D
    lse += problem * H * W
    delta += problem * H * W
    k = load_channels(keys, at, is_key, 0, D, BLOCK_D)
    v = load_channels(values, at, is_key, 0, D, BLOCK_D)

    dk = tl.zeros((TILE * TILE, BLOCK_D), tl.float32)
    dv = tl.zeros((TILE * TILE, BLOCK_D), tl.float32)
    upper, lower = queries_of(first_y, rows, ROWS, CLAMP, TILE)
    left, right = queries_of(first_x, cols, COLS, CLAMP, TILE)
    # near a border more queries see a key than it has neighbors
    across = blocks_in(left, right, BLOCK_X, TILE + (COLS - 1) * (2 if CLAMP else 1))
    for step in range(0, (lower - upper + BLOCK_Y - 1) // BLOCK_Y * across):
        query_y, query_x, is_query, query_row, query_col = locate_block(
            step, across, upper, left, rows, cols, BLOCK_Y, BLOCK_X
        )
        queries_at = query_row * stride_y + query_col * stride_x
        pixels = query_row * W + query_col
        scores = products(k, keys, at, is_key, queries, queries_at, is_query, D, BLOCK_D, PRECISION)
        start_y = window_start(query_y, rows, ROWS, CLAMP)
        start_x = window_start(query_x, cols, COLS, CLAMP)
        seen = are_neighbors(y[:, None], x[:, None], start_y[None, :], start_x[None, :], ROWS, COLS)
        # the weights of what is no query are zero
        query_lse = tl.load(lse + pixels, mask=is_query, other=float("inf"))
        query_delta = tl.load(delta + pixels, mask=is_query, other=0.0)
        scores = tl.where(seen, scores * (scale * LOG2E), float("-inf"))
        weights = tl.exp2(scores - query_lse[None, :])
        da = products(v, values, at, is_key, grads, pixels * C, is_query, D, BLOCK_D, PRECISION)
        ds, unit = fit_along(weights * (da - query_delta[None, :]), 1, k.dtype)
        g = load_channels(grads, pixels * C, is_query, part, D, BLOCK_D)
        dv += tl.dot(weights.to(g.dtype), g, input_precision=PRECISION)
        q = load_channels(queries, queries_at, is_query, part, D, BLOCK_D)
        dk += tl.dot(ds, q, input_precision=PRECISION) * unit
    pixels = image_y * W + image_x
    into = grad_qkv + batch * H * W * (3 * C) + head * D
    store_channels(into + C, pixels * (3 * C), is_key, part, dk * scale, D, BLOCK_D)
    store_channels(into + 2 * C, pixels * (3 * C), is_key, part, dv, D, BLOCK_D)
