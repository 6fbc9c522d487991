"""Depthwise convolutions that stream rows: the gradient of the kernels.

Strips and tiles are those of `_strips.py`. A program of `_depthwise_kernels.py` keeps a sum for
each of K rows of a strip, here the gradients of K rows, and a sum for each tap. Every row of
the input is loaded once and multiplied with all of them. A program serves the blocks of strips
part, part + parts, ..., so that few sums are left to be added.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from ._strips import (
    SIZES,
    columns,
    load_span,
    locate_pixels,
    locate_strips,
    offset_of,
    zeros,
)

WEIGHT_SIZES = [*SIZES, "items"]


@triton.jit
def push_row(rows, row, K: tl.constexpr, SPAN: tl.constexpr):
    """Drop the first of K rows, and append another."""
    pushed = ()
    for n in tl.static_range(SPAN, K * SPAN):
        pushed = pushed + (rows[n],)
    for s in tl.static_range(SPAN):
        pushed = pushed + (row[s],)
    return pushed


@triton.jit
def add_taps(sums, tiles, rows, K: tl.constexpr, SPAN: tl.constexpr):
    """Multiply a row of the input with K rows of gradients, tap by tap."""
    added = ()
    for tap in tl.static_range(K * K):
        total = sums[tap]
        for s in tl.static_range(SPAN):
            total += tiles[s + tap % K] * rows[(K - 1 - tap // K) * SPAN + s]
        added = added + (total,)
    return added


@triton.jit
def add_strided_taps(
    sums, tiles, row, dy: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, SPAN: tl.constexpr
):
    """Multiply a row of the input with a row of gradients, for row dy of the taps."""
    added = ()
    for tap in tl.static_range(K * K):
        total = sums[tap]
        if tap // K == dy:
            for s in tl.static_range(SPAN):
                total += tiles[STRIDE * s + tap % K] * row[s]
        added = added + (total,)
    return added


@triton.jit
def add_all(total, row, SPAN: tl.constexpr):
    """Add the pixels of a row to a sum."""
    for s in tl.static_range(SPAN):
        total += row[s]
    return total


@triton.jit
def store_taps(partial, sums, total, c, C, K: tl.constexpr):
    """Write the sums of this part, `(parts, K * K + 1, C)`: of every tap, and the gradient's."""
    part = partial + tl.cast(tl.program_id(0), tl.int64) * (K * K + 1) * C
    for tap in tl.static_range(K * K):
        tl.store(part + tap * C + c, tl.sum(sums[tap], 0), mask=c < C)
    tl.store(part + K * K * C + c, tl.sum(total, 0), mask=c < C)


@triton.jit(do_not_specialize=WEIGHT_SIZES)
def depthwise_weight_kernel(
    grad,  # (B, H, W, C)
    x,  # (B, H, W, C)
    partial,  # (parts, K * K + 1, C), float32
    grad_b,
    grad_y,
    grad_x,
    x_b,
    x_y,
    x_x,
    H,
    W,
    C,
    problems,
    strips,
    rows,
    chunks,
    items,
    K: tl.constexpr,
    PRE_ACT: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPAN: tl.constexpr,
):
    PAD: tl.constexpr = K // 2
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = zeros(K * K, GROUPS, BLOCK_C)
    total = tl.zeros((GROUPS, BLOCK_C), tl.float32)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        image, first, exists = locate_strips(item // chunks, problems, strips, GROUPS, SPAN)
        inside = exists[:, None] & (c < C * ALIGN)[None, :]
        gradient = locate_pixels(grad, image, first, c, grad_b, grad_x, ALIGN)
        source = locate_pixels(x, image, first - PAD, c, x_b, x_x, ALIGN)
        start = item % chunks * rows
        end = tl.minimum(start + rows, H)
        middle = tl.maximum(start - PAD, 0)
        g = zeros(K * SPAN, GROUPS, BLOCK_C)
        # rows of gradients that the first row of the input meets
        for y in range(start, middle + PAD):
            pixels = gradient + offset_of(y, grad_y, ALIGN)
            row = load_span(pixels, grad_x, first, inside, columns(W, y, end), ALIGN, SPAN, "")
            total = add_all(total, row, SPAN)
            g = push_row(g, row, K, SPAN)
        for y in range(middle, tl.minimum(end + PAD, H)):
            pixels = gradient + offset_of(y + PAD, grad_y, ALIGN)
            width = columns(W, y + PAD, end)
            row = load_span(pixels, grad_x, first, inside, width, ALIGN, SPAN, "")
            pixels = source + offset_of(y, x_y, ALIGN)
            tiles = load_span(pixels, x_x, first - PAD, inside, W, ALIGN, SPAN + K - 1, PRE_ACT)
            total = add_all(total, row, SPAN)
            g = push_row(g, row, K, SPAN)
            sums = add_taps(sums, tiles, g, K, SPAN)
    store_taps(partial, sums, total, c, C * ALIGN, K)


@triton.jit(do_not_specialize=WEIGHT_SIZES)
def depthwise_stride_weight_kernel(
    grad,  # (B, OUT_H, OUT_W, C)
    x,  # (B, H, W, C)
    partial,  # (parts, K * K + 1, C), float32
    grad_b,
    grad_y,
    grad_x,
    x_b,
    x_y,
    x_x,
    H,
    W,
    OUT_H,
    OUT_W,
    C,
    pad_y,
    pad_x,
    problems,
    strips,
    rows,
    chunks,
    items,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PRE_ACT: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPAN: tl.constexpr,
):
    COUNT: tl.constexpr = STRIDE * (SPAN - 1) + K
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = zeros(K * K, GROUPS, BLOCK_C)
    total = tl.zeros((GROUPS, BLOCK_C), tl.float32)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        image, first, exists = locate_strips(item // chunks, problems, strips, GROUPS, SPAN)
        inside = exists[:, None] & (c < C * ALIGN)[None, :]
        gradient = locate_pixels(grad, image, first, c, grad_b, grad_x, ALIGN)
        column = first * STRIDE - pad_x
        source = locate_pixels(x, image, column, c, x_b, x_x, ALIGN)
        start = item % chunks * rows
        for out_y in range(start, tl.minimum(start + rows, OUT_H)):
            pixels = gradient + offset_of(out_y, grad_y, ALIGN)
            g = load_span(pixels, grad_x, first, inside, OUT_W, ALIGN, SPAN, "")
            total = add_all(total, g, SPAN)
            for dy in tl.static_range(K):
                y = out_y * STRIDE + dy - pad_y
                pixels = source + offset_of(y, x_y, ALIGN)
                width = columns(W, y, H)
                tiles = load_span(pixels, x_x, column, inside, width, ALIGN, COUNT, PRE_ACT)
                sums = add_strided_taps(sums, tiles, g, dy, K, STRIDE, SPAN)
    store_taps(partial, sums, total, c, C * ALIGN, K)
