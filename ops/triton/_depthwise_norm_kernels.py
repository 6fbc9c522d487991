"""Depthwise convolutions that stream rows and normalise their pixels; the gradient of the norm.

The convolution is that of `_depthwise_kernels.py`, with tiles that hold all channels of a pixel.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from ._strips import (
    SIZES,
    add_row,
    load_span,
    load_taps,
    load_vector,
    locate_pixels,
    locate_strips,
    move_up,
    offset_of,
    zeros,
)

# one compilation serves all of these
BACKWARD_SIZES = [
    "grad_b", "grad_y", "grad_x", "normed_b", "normed_y", "normed_x", "H", "W", "C", "pixels",
]  # fmt: skip


@triton.jit
def scale_shift(hat, norm_weight, norm_bias):
    """Apply the norm's vectors; None for one that it lacks."""
    if norm_weight is not None:
        hat *= norm_weight[None, :]
    if norm_bias is not None:
        hat += norm_bias[None, :]
    return hat


@triton.jit
def load_optional(ptr, c, C):
    """A vector in float32, or None."""
    vector = None
    if ptr is not None:
        vector = load_vector(ptr, 0, c, C)
    return vector


@triton.jit
def emit_normed(
    target, normed, stats, sums, bias, norm_weight, norm_bias, eps,
    pixel, all_pixels, first, inside, exists, W, C,
    ALIGN: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Write a row of sums, its norm, and the means and inverse deviations of its pixels."""
    for s in tl.static_range(SPAN):
        column = exists & (first + s < W)
        mask = inside & column[:, None]
        rounded = (sums[s] + bias[None, :]).to(target.dtype.element_ty)
        tl.store(target + offset_of(s, C, ALIGN), rounded, mask=mask)
        y = tl.where(inside, rounded.to(tl.float32), 0.0)
        mean = tl.sum(y, 1) / (C * ALIGN)
        centred = tl.where(inside, y - mean[:, None], 0.0)
        rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / (C * ALIGN) + eps)
        tl.store(stats + pixel + s, mean, mask=column)
        tl.store(stats + all_pixels + pixel + s, rstd, mask=column)
        hat = scale_shift(centred * rstd[:, None], norm_weight, norm_bias)
        tl.store(normed + offset_of(s, C, ALIGN), hat.to(normed.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, "all_pixels"])
def depthwise_norm_kernel(
    x,  # (B, H, W, C)
    weight,  # (K * K, C)
    bias,  # (C,) or None
    norm_weight,  # (C,) or None
    norm_bias,  # (C,) or None
    out,  # (B, H, W, C)
    normed,  # (B, H, W, C)
    stats,  # (2, B, H, W), float32: means and inverse deviations
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
    all_pixels,
    eps,
    K: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPAN: tl.constexpr,
):
    PAD: tl.constexpr = K // 2
    image, first, exists = locate_strips(tl.program_id(0) // chunks, problems, strips, GROUPS, SPAN)
    c = tl.arange(0, BLOCK_C)
    inside = exists[:, None] & (c < C * ALIGN)[None, :]
    taps = load_taps(weight, c, C * ALIGN, K, False, RESIDUAL)
    offset = load_vector(bias, 0, c, C * ALIGN)
    scale = load_optional(norm_weight, c, C * ALIGN)
    shift = load_optional(norm_bias, c, C * ALIGN)
    source = locate_pixels(x, image, first - PAD, c, x_b, x_x, ALIGN)
    target = locate_pixels(out, image * H, first, c, W * C, C, ALIGN)
    beside = locate_pixels(normed, image * H, first, c, W * C, C, ALIGN)
    acc = zeros(K * SPAN, GROUPS, BLOCK_C)
    start = tl.program_id(0) % chunks * rows
    end = tl.minimum(start + rows, H)
    last = tl.minimum(end + PAD, H)
    for y in range(tl.maximum(start - PAD, 0), last):
        row = source + offset_of(y, x_y, ALIGN)
        tiles = load_span(row, x_x, first - PAD, inside, W, ALIGN, SPAN + K - 1, "")
        acc = add_row(acc, tiles, taps, K, SPAN)
        if y - PAD >= start:
            below = offset_of(y - PAD, W * C, ALIGN)
            emit_normed(
                target + below, beside + below, stats, acc, offset, scale, shift, eps,
                (image * H + y - PAD) * W + first, all_pixels, first, inside, exists, W, C,
                ALIGN, SPAN,
            )  # fmt: skip
        acc = move_up(acc, K, SPAN)
    for y in range(last, end + PAD):
        if y - PAD >= start:
            below = offset_of(y - PAD, W * C, ALIGN)
            emit_normed(
                target + below, beside + below, stats, acc, offset, scale, shift, eps,
                (image * H + y - PAD) * W + first, all_pixels, first, inside, exists, W, C,
                ALIGN, SPAN,
            )  # fmt: skip
        acc = move_up(acc, K, SPAN)


@triton.jit
def load_pixels(ptr, n, inside, c, H, W, stride_b, stride_y, stride_x, ALIGN: tl.constexpr):
    """Pixels n of all images, row by row, in float32."""
    n = n.to(tl.int64)
    offsets = n // (H * W) * stride_b + n // W % H * stride_y + n % W * stride_x
    pointers = ptr + (offsets * ALIGN)[:, None] + c[None, :]
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def norm_backward_kernel(
    grad,  # (B, H, W, C)
    grad_normed,  # (B, H, W, C)
    y,  # (B, H, W, C)
    stats,  # (2, B, H, W), float32
    norm_weight,  # (C,) or None
    out,  # (B, H, W, C)
    partial,  # (parts, 2, C), float32, or None: for the gradients of the norm's weight and bias
    grad_b,
    grad_y,
    grad_x,
    normed_b,
    normed_y,
    normed_x,
    H,
    W,
    C,
    pixels,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.arange(0, BLOCK_C)
    scale = load_optional(norm_weight, c, C * ALIGN)
    dweight = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    step = tl.num_programs(0) * BLOCK_N
    for block in range(tl.program_id(0) * BLOCK_N, pixels, step):
        n = block + tl.arange(0, BLOCK_N)
        exists = n < pixels
        inside = exists[:, None] & (c < C * ALIGN)[None, :]
        g = load_pixels(grad, n, inside, c, H, W, grad_b, grad_y, grad_x, ALIGN)
        h = load_pixels(grad_normed, n, inside, c, H, W, normed_b, normed_y, normed_x, ALIGN)
        row = (n.to(tl.int64) * C * ALIGN)[:, None] + c[None, :]
        mean = tl.load(stats + n, mask=exists, other=0.0)[:, None]
        rstd = tl.load(stats + pixels + n, mask=exists, other=0.0)[:, None]
        hat = (tl.load(y + row, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        dweight += h * hat
        dbias += h
        h = scale_shift(h, scale, None)
        average = tl.sum(h, 1)[:, None] / (C * ALIGN)
        along = tl.sum(h * hat, 1)[:, None] / (C * ALIGN)
        dy = g + rstd * (h - average - hat * along)
        tl.store(out + row, dy.to(out.dtype.element_ty), mask=inside)
    if partial is not None:
        part = partial + tl.program_id(0) * 2 * C * ALIGN + c
        tl.store(part, tl.sum(dweight, 0), mask=c < C * ALIGN)
        tl.store(part + C * ALIGN, tl.sum(dbias, 0), mask=c < C * ALIGN)
