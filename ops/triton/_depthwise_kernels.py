"""Depthwise convolutions that stream rows: a result, and the gradient of the input."""

# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from ._strips import (
    SIZES,
    add_row,
    columns,
    emit_row,
    load_shift,
    load_span,
    load_taps,
    load_vector,
    locate_pixels,
    locate_strips,
    move_up,
    offset_of,
    store_sums,
    zeros,
)


@triton.jit(do_not_specialize=SIZES)
def depthwise_rows_kernel(
    x,  # (B, H, W, C)
    weight,  # (K * K, C)
    bias,  # (C,) or None
    other,  # (B, H, W, C) or None, see `emit_row`
    shift,  # (B, C), float32, or None
    out,  # (B, H, W, C)
    sums,  # (B, chunks * strips, C), float32, or None: sums that SUM says, of `out`
    x_b,
    x_y,
    x_x,
    other_b,
    other_y,
    other_x,
    H,
    W,
    C,
    problems,
    strips,
    rows,
    chunks,
    K: tl.constexpr,
    FLIP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRE_ACT: tl.constexpr,
    JOB: tl.constexpr,
    ACT: tl.constexpr,
    SUM: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPAN: tl.constexpr,
):
    PAD: tl.constexpr = K // 2
    image, first, exists = locate_strips(tl.program_id(0) // chunks, problems, strips, GROUPS, SPAN)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = exists[:, None] & (c < C * ALIGN)[None, :]
    taps = load_taps(weight, c, C * ALIGN, K, FLIP, RESIDUAL)
    offset = load_vector(bias, 0, c, C * ALIGN)
    moved = load_shift(shift, image, inside, c, C * ALIGN, GROUPS, BLOCK_C)
    source = locate_pixels(x, image, first - PAD, c, x_b, x_x, ALIGN)
    target = locate_pixels(out, image * H, first, c, W * C, C, ALIGN)
    beside = target
    if other is not None:
        beside = locate_pixels(other, image, first, c, other_b, other_x, ALIGN)
    acc = zeros(K * SPAN, GROUPS, BLOCK_C)
    total = tl.zeros((GROUPS, BLOCK_C), tl.float32)
    start = tl.program_id(0) % chunks * rows
    end = tl.minimum(start + rows, H)
    last = tl.minimum(end + PAD, H)
    for y in range(tl.maximum(start - PAD, 0), last):
        row = source + offset_of(y, x_y, ALIGN)
        tiles = load_span(row, x_x, first - PAD, inside, W, ALIGN, SPAN + K - 1, PRE_ACT)
        acc = add_row(acc, tiles, taps, K, SPAN)
        if y - PAD >= start:
            total = emit_row(
                target + offset_of(y - PAD, W * C, ALIGN), C,
                beside + offset_of(y - PAD, other_y, ALIGN), other_x,
                acc, offset, moved, total, first, inside, W, JOB, ACT, ALIGN, SPAN, SUM,
            )  # fmt: skip
        acc = move_up(acc, K, SPAN)
    for y in range(last, end + PAD):
        if y - PAD >= start:
            total = emit_row(
                target + offset_of(y - PAD, W * C, ALIGN), C,
                beside + offset_of(y - PAD, other_y, ALIGN), other_x,
                acc, offset, moved, total, first, inside, W, JOB, ACT, ALIGN, SPAN, SUM,
            )  # fmt: skip
        acc = move_up(acc, K, SPAN)
    store_sums(sums, total, image, first // SPAN, strips, chunks, inside, c, C * ALIGN)


@triton.jit
def add_strided(
    sums, tiles, taps, dy: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, SPAN: tl.constexpr
):
    """Add a row of the input, which meets row dy of the taps, to a row of sums."""
    added = ()
    for s in tl.static_range(SPAN):
        total = sums[s]
        for dx in tl.static_range(K):
            total += tiles[STRIDE * s + dx] * taps[dy * K + dx][None, :]
        added = added + (total,)
    return added


@triton.jit(do_not_specialize=SIZES)
def depthwise_stride_kernel(
    x,  # (B, H, W, C)
    weight,  # (K * K, C)
    bias,  # (C,) or None
    other,  # (B, OUT_H, OUT_W, C) or None, see `emit_row`
    shift,  # (B, C), float32, or None
    out,  # (B, OUT_H, OUT_W, C)
    sums,  # (B, chunks * strips, C), float32, or None: sums that SUM says, of `out`
    x_b,
    x_y,
    x_x,
    other_b,
    other_y,
    other_x,
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
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PRE_ACT: tl.constexpr,
    JOB: tl.constexpr,
    ACT: tl.constexpr,
    SUM: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPAN: tl.constexpr,
):
    COUNT: tl.constexpr = STRIDE * (SPAN - 1) + K
    image, first, exists = locate_strips(tl.program_id(0) // chunks, problems, strips, GROUPS, SPAN)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = exists[:, None] & (c < C * ALIGN)[None, :]
    taps = load_taps(weight, c, C * ALIGN, K)
    offset = load_vector(bias, 0, c, C * ALIGN)
    moved = load_shift(shift, image, inside, c, C * ALIGN, GROUPS, BLOCK_C)
    column = first * STRIDE - pad_x
    source = locate_pixels(x, image, column, c, x_b, x_x, ALIGN)
    target = locate_pixels(out, image * OUT_H, first, c, OUT_W * C, C, ALIGN)
    beside = target
    if other is not None:
        beside = locate_pixels(other, image, first, c, other_b, other_x, ALIGN)
    total = tl.zeros((GROUPS, BLOCK_C), tl.float32)
    start = tl.program_id(0) % chunks * rows
    for out_y in range(start, tl.minimum(start + rows, OUT_H)):
        acc = zeros(SPAN, GROUPS, BLOCK_C)
        for dy in tl.static_range(K):
            y = out_y * STRIDE + dy - pad_y
            row = source + offset_of(y, x_y, ALIGN)
            tiles = load_span(row, x_x, column, inside, columns(W, y, H), ALIGN, COUNT, PRE_ACT)
            acc = add_strided(acc, tiles, taps, dy, K, STRIDE, SPAN)
        total = emit_row(
            target + offset_of(out_y, OUT_W * C, ALIGN), C,
            beside + offset_of(out_y, other_y, ALIGN), other_x,
            acc, offset, moved, total, first, inside, OUT_W, JOB, ACT, ALIGN, SPAN, SUM,
        )  # fmt: skip
    store_sums(sums, total, image, first // SPAN, strips, chunks, inside, c, C * ALIGN)


@triton.jit
def add_pair(left, right, taps, START: tl.constexpr):
    """A gradient and its left neighbour at the taps 0 and 2 of a row."""
    return right * taps[START][None, :] + left * taps[START + 2][None, :]


@triton.jit(do_not_specialize=SIZES)
def depthwise_stride_grad_kernel(
    grad,  # (B, OUT_H, OUT_W, C)
    weight,  # (9, C)
    other,  # (B, H, W, C) or None: what the activation before took
    out,  # (B, H, W, C)
    grad_b,
    grad_y,
    grad_x,
    other_b,
    other_y,
    other_x,
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
    JOB: tl.constexpr,
    ACT: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Stride 2, kernels of 3: a strip is SPAN pairs of columns of the padded input, `rows` pairs.

    In a pair of the padded input the first meets the taps 0 and 2, the second tap 1.
    """
    image, first, exists = locate_strips(tl.program_id(0) // chunks, problems, strips, GROUPS, SPAN)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = exists[:, None] & (c < C * ALIGN)[None, :]
    taps = load_taps(weight, c, C * ALIGN, 3)
    nothing = load_vector(None, 0, c, C)
    unused = tl.zeros((GROUPS, BLOCK_C), tl.float32)
    column = 2 * first - pad_x
    source = locate_pixels(grad, image, first - 1, c, grad_b, grad_x, ALIGN)
    target = locate_pixels(out, image * H, column, c, W * C, C, ALIGN)
    beside = target
    if other is not None:
        beside = locate_pixels(other, image, column, c, other_b, other_x, ALIGN)
    start = tl.program_id(0) % chunks * rows
    for pair in range(start, tl.minimum(start + rows, (H + pad_y + 1) // 2)):
        row = source + offset_of(pair, grad_y, ALIGN)
        width = columns(OUT_W, pair, OUT_H)
        g = load_span(row, grad_x, first - 1, inside, width, ALIGN, SPAN + 1, "")
        row = source + offset_of(pair - 1, grad_y, ALIGN)
        width = columns(OUT_W, pair - 1, OUT_H)
        above = load_span(row, grad_x, first - 1, inside, width, ALIGN, SPAN + 1, "")
        even, odd = (), ()
        for s in tl.static_range(SPAN):
            odd = odd + (add_pair(g[s], g[s + 1], taps, 3), g[s + 1] * taps[4][None, :])
            even = even + (
                add_pair(g[s], g[s + 1], taps, 0) + add_pair(above[s], above[s + 1], taps, 6),
                g[s + 1] * taps[1][None, :] + above[s + 1] * taps[7][None, :],
            )
        y = 2 * pair - pad_y
        if y >= 0:
            emit_row(
                target + offset_of(y, W * C, ALIGN), C,
                beside + offset_of(y, other_y, ALIGN), other_x,
                even, nothing, unused, unused, column, inside, W, JOB, ACT, ALIGN, 2 * SPAN, "",
            )  # fmt: skip
        if y + 1 < H:
            emit_row(
                target + offset_of(y + 1, W * C, ALIGN), C,
                beside + offset_of(y + 1, other_y, ALIGN), other_x,
                odd, nothing, unused, unused, column, inside, W, JOB, ACT, ALIGN, 2 * SPAN, "",
            )  # fmt: skip
