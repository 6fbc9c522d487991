"""Window attention in one tile per window and head, for windows of up to 64 tokens.

Tiles of tokens are `(BLOCK_N, BLOCK_D)`, of scores `(BLOCK_N, BLOCK_N)`. A program serves one head
of many windows, so that the bias is gathered from the table once.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._tokens import LOG2E, load_tokens, store_tokens
from ._window_tokens import load_bias, locate

# one compilation serves all of these
SIZES = ["H", "W", "rows", "cols", "windows", "table_h", "table_y", "table_x"]


@triton.jit(do_not_specialize=SIZES)
def window_fwd_kernel(
    qkv,  # (B, H, W, 3C)
    table,  # (heads, 2P - 1, 2Q - 1) or None
    pad,  # (3C,) or None
    out,  # (B, H, W, C)
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
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    start = head * step
    if table is not None:
        table += head * table_h
    bias = load_bias(table, table_y, table_x, n, n, P, Q, BLOCK_N, BLOCK_N)
    # hides what the tile has beyond the window, once for all windows
    bias = tl.where((n < P * Q)[None, :], bias, float("-inf"))
    for window in range(tl.program_id(1), windows, tl.num_programs(1)):
        tokens, pixels, inside = locate(
            window, n, H, W, rows, cols, stride_b, stride_y, stride_x, P, Q, GRID
        )
        q = load_tokens(qkv, pad, start, tokens, inside, D, BLOCK_D)
        k = load_tokens(qkv, pad, start + part, tokens, inside, D, BLOCK_D)
        v = load_tokens(qkv, pad, start + 2 * part, tokens, inside, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
        if RAGGED and pad is None:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        values = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        values = values / tl.sum(weights, 1)[:, None]
        store_tokens(out, head * D, pixels * C, inside, values, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def window_bwd_kernel(
    grad,  # (B, H, W, C)
    qkv,  # (B, H, W, 3C)
    table,  # (heads, 2P - 1, 2Q - 1) or None
    pad,  # (3C,) or None
    grad_qkv,  # (B, H, W, 3C)
    grad_bias,  # (programs, heads, BLOCK_N, BLOCK_N) or None
    grad_pad,  # (programs, 3C) or None
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
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0)
    program = tl.program_id(1)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    start = head * step
    if table is not None:
        table += head * table_h
    bias = load_bias(table, table_y, table_x, n, n, P, Q, BLOCK_N, BLOCK_N)
    # hides what the tile has beyond the window, once for all windows
    bias = tl.where((n < P * Q)[None, :], bias, float("-inf"))
    sum_ds = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    pad_dk = tl.zeros((BLOCK_D,), tl.float32)
    pad_dv = tl.zeros((BLOCK_D,), tl.float32)
    for window in range(program, windows, tl.num_programs(1)):
        tokens, pixels, inside = locate(
            window, n, H, W, rows, cols, stride_b, stride_y, stride_x, P, Q, GRID
        )
        q = load_tokens(qkv, pad, start, tokens, inside, D, BLOCK_D)
        k = load_tokens(qkv, pad, start + part, tokens, inside, D, BLOCK_D)
        v = load_tokens(qkv, pad, start + 2 * part, tokens, inside, D, BLOCK_D)
        # zero in the rows of tokens that are no queries, which makes their part of ds, dk, dv zero
        g = load_tokens(grad, None, head * D, pixels * C, inside, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
        if RAGGED and pad is None:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        weights = weights / tl.sum(weights, 1)[:, None]
        dv = tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision=PRECISION)
        store_tokens(grad_qkv, start + 2 * part, pixels * 3 * C, inside, dv, D, BLOCK_D)
        da = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        ds = weights * (da - tl.sum(weights * da, 1)[:, None])
        sum_ds += ds
        ds = ds.to(q.dtype)
        dq = tl.dot(ds, k, input_precision=PRECISION) * scale
        store_tokens(grad_qkv, start, pixels * 3 * C, inside, dq, D, BLOCK_D)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
        store_tokens(grad_qkv, start + part, pixels * 3 * C, inside, dk, D, BLOCK_D)
        if grad_pad is not None:
            outside = (~inside & (n < P * Q))[:, None]
            pad_dk += tl.sum(tl.where(outside, dk, 0.0), 0)
            pad_dv += tl.sum(tl.where(outside, dv, 0.0), 0)
    if grad_bias is not None:
        tile = grad_bias + (program * tl.num_programs(0) + head) * BLOCK_N * BLOCK_N
        tl.store(tile + n[:, None] * BLOCK_N + n[None, :], sum_ds)
    if grad_pad is not None:
        row = grad_pad + program * 3 * C + start + d
        tl.store(row, tl.zeros((BLOCK_D,), tl.float32), mask=d < D)
        tl.store(row + part, pad_dk, mask=d < D)
        tl.store(row + 2 * part, pad_dv, mask=d < D)


@triton.jit
def offset_sum_kernel(
    pairs,  # (heads, ROW, ROW), with N <= ROW tokens of a window
    out,  # (heads, 2P - 1, 2Q - 1)
    ROW: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offset, head = tl.program_id(0), tl.program_id(1)
    N: tl.constexpr = P * Q
    dy = offset // (2 * Q - 1) - (P - 1)
    dx = offset % (2 * Q - 1) - (Q - 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, N, BLOCK):
        i = first + tl.arange(0, BLOCK)
        y, x = i // Q - dy, i % Q - dx
        mask = (i < N) & (y >= 0) & (y < P) & (x >= 0) & (x < Q)
        total += tl.load(pairs + (head * ROW + i) * ROW + y * Q + x, mask=mask, other=0.0)
    tl.store(out + head * (2 * P - 1) * (2 * Q - 1) + offset, tl.sum(total, 0))
