"""Sums over windows with given weights, forward and backward, by banded matrices.

A program serves one image and head, and of a row of its map a block of neighbors of one residue:
queries forward and for the gradients of weights, keys for those of values. Every row of slots is a
banded matrix, loaded from where its weights lie or stored to it.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._bands import (
    count_positions,
    first_query,
    last_query,
    load_pixels,
    locate_block,
    store_pixels,
    window_start,
)

# one compilation serves all of these
SIZES = ["heads", "H", "W", "blocks", "dilation_y", "dilation_x"]


@triton.jit(do_not_specialize=SIZES)
def band_fwd_kernel(
    attn,  # (B, heads, H, W, ROWS * COLS)
    value,  # (B, heads, H, W, D)
    out,  # (B, heads, H, W, D), contiguous
    attn_b,
    attn_h,
    attn_y,
    attn_x,
    value_b,
    value_h,
    value_y,
    value_x,
    heads,
    H,
    W,
    blocks,
    dilation_y,
    dilation_x,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of a block of queries, of BLOCK_D channels."""
    index = tl.program_id(0)
    columns = blocks * dilation_x
    residue, count, first = locate_block(index % columns, W, blocks, dilation_x, BLOCK_Q)
    row = index // columns
    problem, y = (row // H).to(tl.int64), row % H
    batch, head = problem // heads, problem % heads
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    query = first + tl.arange(0, BLOCK_Q)
    start = window_start(query, count, COLS)
    key = window_start(first, count, COLS) + tl.arange(0, BLOCK_K)
    slot = key[None, :] - start[:, None]
    band = (slot >= 0) & (slot < COLS) & (query < count)[:, None]
    x, key_x = query * dilation_x + residue, key * dilation_x + residue
    rest = y % dilation_y
    top = window_start(y // dilation_y, count_positions(H, rest, dilation_y), ROWS)
    attn += batch * attn_b + head * attn_h + y.to(tl.int64) * attn_y
    value += batch * value_b + head * value_h
    weights_at = x.to(tl.int64)[:, None] * attn_x + slot
    total = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for a in range(0, ROWS):
        weights = tl.load(attn + a * COLS + weights_at, mask=band, other=0.0)
        key_y = ((top + a) * dilation_y + rest).to(tl.int64)
        v = load_pixels(value + key_y * value_y, key_x, value_x, channels, key < count, D)
        total += tl.dot(weights, v, input_precision=PRECISION)
    out += (problem * H + y) * W * D
    store_pixels(out, x, D, channels, query < count, total, D)


@triton.jit(do_not_specialize=SIZES)
def band_bwd_attn_kernel(
    grad,  # (B, heads, H, W, D), contiguous
    value,  # (B, heads, H, W, D)
    grad_attn,  # (B, heads, H, W, ROWS * COLS), contiguous
    value_b,
    value_h,
    value_y,
    value_x,
    heads,
    H,
    W,
    blocks,
    dilation_y,
    dilation_x,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the weights of a block of queries."""
    index = tl.program_id(0)
    columns = blocks * dilation_x
    residue, count, first = locate_block(index % columns, W, blocks, dilation_x, BLOCK_Q)
    row = index // columns
    problem, y = (row // H).to(tl.int64), row % H
    query = first + tl.arange(0, BLOCK_Q)
    start = window_start(query, count, COLS)
    key = window_start(first, count, COLS) + tl.arange(0, BLOCK_K)
    slot = key[None, :] - start[:, None]
    band = (slot >= 0) & (slot < COLS) & (query < count)[:, None]
    x, key_x = query * dilation_x + residue, key * dilation_x + residue
    rest = y % dilation_y
    top = window_start(y // dilation_y, count_positions(H, rest, dilation_y), ROWS)
    pixels = (problem * H + y) * W
    value += problem // heads * value_b + problem % heads * value_h
    weights_at = x.to(tl.int64)[:, None] * (ROWS * COLS) + slot
    grad_attn += pixels * (ROWS * COLS)
    channels = tl.arange(0, BLOCK_D)
    for a in range(0, ROWS):
        key_y = ((top + a) * dilation_y + rest).to(tl.int64)
        products = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        for skipped in range(0, D, BLOCK_D):
            part = skipped + channels
            g = load_pixels(grad + pixels * D, x, D, part, query < count, D)
            v = load_pixels(value + key_y * value_y, key_x, value_x, part, key < count, D)
            products += tl.dot(g, tl.trans(v), input_precision=PRECISION)
        products = products.to(grad_attn.dtype.element_ty)
        tl.store(grad_attn + a * COLS + weights_at, products, mask=band)


@triton.jit(do_not_specialize=SIZES)
def band_bwd_value_kernel(
    grad,  # (B, heads, H, W, D), contiguous
    attn,  # (B, heads, H, W, ROWS * COLS)
    grad_value,  # (B, heads, H, W, D), contiguous
    attn_b,
    attn_h,
    attn_y,
    attn_x,
    heads,
    H,
    W,
    blocks,
    dilation_y,
    dilation_x,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a block of values, of BLOCK_D channels, from all queries that see them."""
    index = tl.program_id(0)
    columns = blocks * dilation_x
    residue, count, first = locate_block(index % columns, W, blocks, dilation_x, BLOCK_K)
    row = index // columns
    problem, key_y = (row // H).to(tl.int64), row % H
    batch, head = problem // heads, problem % heads
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    key = first + tl.arange(0, BLOCK_K)
    rest = key_y % dilation_y
    rows = count_positions(H, rest, dilation_y)
    own = key_y // dilation_y
    left = first_query(first, COLS)
    right = last_query(tl.minimum(first + BLOCK_K, count) - 1, count, COLS)
    attn += batch * attn_b + head * attn_h
    grad += problem * H * W * D
    total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for position in range(first_query(own, ROWS), last_query(own, rows, ROWS) + 1):
        y = (position * dilation_y + rest).to(tl.int64)
        a = own - window_start(position, rows, ROWS)
        for begin in range(left, right + 1, BLOCK_Q):
            query = begin + tl.arange(0, BLOCK_Q)
            slot = key[:, None] - window_start(query, count, COLS)[None, :]
            band = (slot >= 0) & (slot < COLS) & (query < count)[None, :]
            x = query * dilation_x + residue
            weights_at = y * attn_y + x.to(tl.int64)[None, :] * attn_x + slot
            weights = tl.load(attn + a * COLS + weights_at, mask=band, other=0.0)
            g = load_pixels(grad + y * W * D, x, D, channels, query < count, D)
            total += tl.dot(weights, g, input_precision=PRECISION)
    grad_value += (problem * H + key_y) * W * D
    x = key * dilation_x + residue
    store_pixels(grad_value, x, D, channels, key < count, total, D)
