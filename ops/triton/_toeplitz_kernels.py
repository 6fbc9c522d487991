"""Depthwise convolution with large kernels as products of small matrices.

Row `a` of the kernel of a channel, written as a Toeplitz matrix `T_a[j, i] = w[a, j - i]`, takes 32
pixels of a row of the map to COLS outputs, so that matrix units compute it. A program has BLOCK_M
strips of COLS columns, side by side or of any images, and BLOCK_C channels, and goes down the
rows of all its strips at once. The forward kernel reads each row of the map once and adds
it to the K rows of outputs that it reaches, K - 1 of which wait in registers; the other kernel
keeps as many rows of gradients.

Rows of strips are `(BLOCK_M, 32, BLOCK_C)` as they lie in memory, channels first for products.
Strides, and C, count units of ALIGN elements: so the compiler knows how wide to load.
"""

# mypy: disable-error-code="no-untyped-def, assignment, misc"

import triton
import triton.language as tl

from ._activations import activate, derivative

# one compilation serves all of these
SIZES = ["H", "W", "strips", "rows", "total"]


@triton.jit
def packed_row(e, WIDE: tl.constexpr, COLS: tl.constexpr):
    """Matrix row j and column i of value e of a packed Toeplitz matrix, see `load_matrix`."""
    if WIDE:
        part, lane, v = e // 128, e // 4 % 32, e % 4
        i = lane // 4 + part // 2 * 8
        j = part % 2 * 16 + v // 2 * 8 + v % 2 * 4 + lane % 4
    else:
        part, lane, v = e // 256, e // 8 % 32, e % 8
        i = lane // 4 + part * 8
        j = v // 4 * 16 + v // 2 % 2 * 8 + lane % 4 * 2 + v % 2
    return j, i


@triton.jit
def toeplitz_expand_kernel(
    weight,  # (C, 1, K, K)
    matrices,  # (channels, K, 32 * COLS), channels a multiple of BLOCK_C and not below C
    C,
    K: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FLIP: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    e, a = tl.arange(0, 32 * COLS), tl.program_id(1)
    j, i = packed_row(e, matrices.dtype.element_ty == tl.float32, COLS)
    tap = a * K + j - i
    if FLIP:
        tap = K * K - 1 - tap
    mask = ((j >= i) & (j - i < K))[None, :] & (c < C)[:, None]
    values = tl.load(weight + c[:, None] * (K * K) + tap[None, :], mask=mask, other=0.0)
    # behind the last channel zeros, which `load_matrix` reads
    tl.store(matrices + ((c * K + a) * (32 * COLS))[:, None] + e[None, :], values)


@triton.jit
def load_matrix(matrices, c, a, K: tl.constexpr, COLS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Toeplitz matrices `(BLOCK_C, 32, COLS)` of kernel row a, of channels from c on.

    They are packed so that every thread reads 16 bytes at a time and has at once what it gives to
    the matrix unit of NVIDIA GPUs; elsewhere the order costs nothing more than another would.
    """
    WIDE: tl.constexpr = matrices.dtype.element_ty == tl.float32
    LENGTH: tl.constexpr = 128 if WIDE else 256
    PARTS: tl.constexpr = 32 * COLS // LENGTH
    r = tl.arange(0, PARTS * BLOCK_C)
    offsets = ((c + r % BLOCK_C).to(tl.int64) * K + a) * (32 * COLS) + r // BLOCK_C * LENGTH
    # no mask: there are matrices of zeros behind the last channel
    t = tl.load(matrices + offsets[:, None] + tl.arange(0, LENGTH)[None, :])
    if WIDE:
        t = tl.reshape(t, (COLS // 8, 2, BLOCK_C, 8, 4, 2, 2))
        t = tl.permute(t, (2, 1, 5, 6, 4, 0, 3))
    else:
        t = tl.reshape(t, (COLS // 8, BLOCK_C, 8, 4, 2, 2, 2))
        t = tl.permute(t, (1, 4, 5, 3, 6, 0, 2))
    return tl.reshape(t, (BLOCK_C, 32, COLS))


@triton.jit
def in_elements(stride_b, stride_y, stride_x, ALIGN: tl.constexpr):
    """Strides in elements, from units of ALIGN."""
    b, y, x = tl.cast(stride_b, tl.int64), tl.cast(stride_y, tl.int64), tl.cast(stride_x, tl.int64)
    return b * ALIGN, y * ALIGN, x * ALIGN


@triton.jit
def locate_strips(block, strips, COLS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Numbers of the strips of a block, their images and first columns."""
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    return m, m // strips, m % strips * COLS


@triton.jit
def locate_pixels(image, col, c, inside, W, C, stride_b, stride_x):
    """Offsets of the pixels at columns `(BLOCK_M, N)` of row 0, and which are in the map."""
    offsets = (image.to(tl.int64) * stride_b)[:, None] + col.to(tl.int64) * stride_x
    mask = inside[:, None] & (col >= 0) & (col < W)
    return offsets[:, :, None] + c[None, None, :], mask[:, :, None] & (c < C)[None, None, :]


@triton.jit
def is_within(row, low, high):
    """Whether low <= row < high, to be combined with masks `(M, N, C)`."""
    # a block, since the interpreter cannot combine a mask with a scalar
    block = row + tl.zeros((1, 1, 1), tl.int32)
    return (block >= low) & (block < high)


@triton.jit
def load_row(ptr, offsets, mask, row, low, high, stride_y):
    """Pixels of a row, zero outside low..high."""
    start = ptr + tl.cast(row, tl.int64) * stride_y
    return tl.load(start + offsets, mask=mask & is_within(row, low, high), other=0.0)


@triton.jit
def before(t, PRE_ACT: tl.constexpr):
    """What is convolved: the activation of a tile, rounded."""
    if PRE_ACT != "":
        t = activate(t.to(tl.float32), PRE_ACT).to(t.dtype)
    return t


@triton.jit
def behind(
    done,
    row,
    low,
    high,
    image,
    col,
    c,
    inside,
    x,
    bias,
    addend,
    grad,
    grad_mean,
    point,
    out,
    x_b,
    x_y,
    x_x,
    side_b,
    side_y,
    side_x,
    H,
    W,
    C,
    RESIDUAL: tl.constexpr,
    PRE_ACT: tl.constexpr,
    ACT: tl.constexpr,
    SUM: tl.constexpr,
):
    """Finish and store row `row` of outputs `(BLOCK_C, BLOCK_M, COLS)`; return sums of a strip.

    Of squares, if SUM is "square".
    """
    value = tl.permute(done, (1, 2, 0))
    if bias is not None:
        value += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, None, :]
    if RESIDUAL:
        offsets, mask = locate_pixels(image, col, c, inside, W, C, x_b, x_x)
        center = load_row(x, offsets, mask, row, low, high, x_y)
        value += before(center, PRE_ACT).to(tl.float32)
    offsets, mask = locate_pixels(image, col, c, inside, W, C, side_b, side_x)
    if addend is not None:
        value += load_row(addend, offsets, mask, row, low, high, side_y).to(tl.float32)
    if grad is not None:
        g = load_row(grad, offsets, mask, row, low, high, side_y).to(tl.float32)
        if grad_mean is not None:
            known = inside[:, None] & (c < C)[None, :]
            vectors = grad_mean + (image.to(tl.int64) * C)[:, None] + c[None, :]
            means = tl.load(vectors, mask=known, other=0.0).to(tl.float32)
            g += (means / (H * W).to(tl.float32))[:, None, :]
        value = g * derivative(value, ACT)
    elif point is not None:
        at = load_row(point, offsets, mask, row, low, high, side_y).to(tl.float32)
        value *= derivative(at, ACT)
    else:
        value = activate(value, ACT)
    rounded = value.to(out.dtype.element_ty)
    offsets, mask = locate_pixels(image, col, c, inside, W, C, tl.cast(H * W, tl.int64) * C, C)
    mask = mask & is_within(row, low, high)
    tl.store(out + tl.cast(row, tl.int64) * W * C + offsets, rounded, mask=mask)
    written = tl.where(mask, rounded.to(tl.float32), 0.0)
    if SUM == "square":
        written *= written
    return tl.sum(written, 1)


@triton.jit(do_not_specialize=[*SIZES, "first", "last", "end"])
def toeplitz_conv_kernel(
    x,  # (B, H, W, C)
    matrices,  # (channels, K, 32 * COLS)
    bias,  # (C,) or None
    addend,  # (B, H, W, C) or None
    grad,  # (B, H, W, C) or None: store its product with the derivative of the activation
    grad_mean,  # (B, C) or None
    point,  # (B, H, W, C) or None: multiply by the derivative of the activation there
    out,  # (B, H, W, C)
    sums,  # (B * strips, chunks, C) or None: sums of `out`, or of squares
    x_b,
    x_y,
    x_x,
    side_b,  # of the one among addend, grad, and point that there is
    side_y,
    side_x,
    H,
    W,
    C,
    strips,
    rows,
    total,
    first,
    last,
    end,
    K: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRE_ACT: tl.constexpr,
    ACT: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    C *= ALIGN
    x_b, x_y, x_x = in_elements(x_b, x_y, x_x, ALIGN)
    side_b, side_y, side_x = in_elements(side_b, side_y, side_x, ALIGN)
    start = tl.program_id(0) * BLOCK_C
    m, image, left = locate_strips(tl.program_id(1), strips, COLS, BLOCK_M)
    inside, low = m < total, tl.program_id(2) * rows
    high = tl.minimum(low + rows, H)
    c = start + tl.arange(0, BLOCK_C)
    col = left[:, None] + tl.arange(0, COLS)[None, :]
    reached = left[:, None] - K // 2 + tl.arange(0, 32)[None, :]
    offsets, mask = locate_pixels(image, reached, c, inside, W, C, x_b, x_x)
    none = tl.zeros((BLOCK_C, BLOCK_M, COLS), tl.float32)
    waiting = ()
    for _ in tl.static_range(K - 1):
        waiting = waiting + (none,)
    added = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    read = load_row(x, offsets, mask, low + first - K // 2, 0, H, x_y)
    for step in range(first, last):
        strip = tl.permute(before(read, PRE_ACT), (2, 0, 1))
        read = load_row(x, offsets, mask, low + step + 1 - K // 2, 0, H, x_y)
        t = load_matrix(matrices, start, K - 1, K, COLS, BLOCK_C)
        done = tl.dot(strip, t, waiting[0], input_precision=PRECISION)
        added += behind(
            done, low + step - (K - 1), low, high, image, col, c, inside,
            x, bias, addend, grad, grad_mean, point, out, x_b, x_y, x_x, side_b, side_y, side_x,
            H, W, C, RESIDUAL, PRE_ACT, ACT, SUM,
        )  # fmt: skip
        moved = ()
        for q in tl.static_range(1, K - 1):
            t = load_matrix(matrices, start, K - 1 - q, K, COLS, BLOCK_C)
            moved = moved + (tl.dot(strip, t, waiting[q], input_precision=PRECISION),)
        t = load_matrix(matrices, start, 0, K, COLS, BLOCK_C)
        waiting = moved + (tl.dot(strip, t, input_precision=PRECISION),)
    # rows below the map add nothing any more
    for step in range(last, end):
        added += behind(
            waiting[0], low + step - (K - 1), low, high, image, col, c, inside,
            x, bias, addend, grad, grad_mean, point, out, x_b, x_y, x_x, side_b, side_y, side_x,
            H, W, C, RESIDUAL, PRE_ACT, ACT, SUM,
        )  # fmt: skip
        waiting = waiting[1:] + (none,)
    if sums is not None:
        known = inside[:, None] & (c < C)[None, :]
        index = m.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
        tl.store(sums + index[:, None] * C + c[None, :], added, mask=known)


@triton.jit(do_not_specialize=[*SIZES, "chunks"])
def toeplitz_grad_weight_kernel(
    dy,  # (B, H, W, C)
    x,  # (B, H, W, C)
    weights,  # (parts, C, K, K)
    biases,  # (parts, C)
    dy_b,
    dy_y,
    dy_x,
    x_b,
    x_y,
    x_x,
    H,
    W,
    C,
    strips,
    rows,
    total,
    chunks,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRE_ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    C *= ALIGN
    dy_b, dy_y, dy_x = in_elements(dy_b, dy_y, dy_x, ALIGN)
    x_b, x_y, x_x = in_elements(x_b, x_y, x_x, ALIGN)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part, a = tl.program_id(1), tl.program_id(2) * ROWS
    ahead = a - K // 2
    products = ()
    for _ in tl.static_range(ROWS):
        products = products + (tl.zeros((BLOCK_C, COLS, 32), tl.float32),)
    added = tl.zeros((BLOCK_M, COLS, BLOCK_C), tl.float32)
    nothing = tl.zeros((BLOCK_C, COLS, BLOCK_M), dy.dtype.element_ty)
    m = tl.arange(0, BLOCK_M)
    one = tl.where(m[:, None] == m[None, :], 1.0, 0.0).to(dy.dtype.element_ty)
    one = tl.broadcast_to(one[None, :, :], (BLOCK_C, BLOCK_M, BLOCK_M))
    for block in range(part, tl.cdiv(total, BLOCK_M) * chunks, tl.num_programs(1)):
        m, image, left = locate_strips(block // chunks, strips, COLS, BLOCK_M)
        inside, low = m < total, block % chunks * rows
        high = tl.minimum(low + rows, H)
        col = left[:, None] + tl.arange(0, COLS)[None, :]
        reached = left[:, None] - K // 2 + tl.arange(0, 32)[None, :]
        x_offsets, x_mask = locate_pixels(image, reached, c, inside, W, C, x_b, x_x)
        offsets, mask = locate_pixels(image, col, c, inside, W, C, dy_b, dy_x)
        kept = ()
        for _ in tl.static_range(ROWS - 1):
            kept = kept + (nothing,)
        for step in range(0, rows + ROWS - 1):
            strip = load_row(x, x_offsets, x_mask, low + step + ahead, 0, H, x_y)
            strip = tl.permute(before(strip, PRE_ACT), (2, 0, 1))
            g = load_row(dy, offsets, mask, low + step, low, high, dy_y)
            added += g.to(tl.float32)
            # results of matrix units are operands as they are; every product would fetch what was
            # loaded through shared memory
            g = tl.dot(tl.permute(g, (2, 1, 0)), one, input_precision=PRECISION)
            kept = (g.to(dy.dtype.element_ty),) + kept
            summed = ()
            for q in tl.static_range(ROWS):
                summed = summed + (tl.dot(kept[q], strip, products[q], input_precision=PRECISION),)
            products = summed
            kept = kept[: ROWS - 1]
    # tap d is the sum of diagonal d, which the shift of every row makes a column
    d = tl.arange(0, 32)
    shifted = tl.minimum(d[None, None, :] + tl.arange(0, COLS)[None, :, None], 31)
    shifted = tl.broadcast_to(shifted, (BLOCK_C, COLS, 32))
    base = weights + (tl.cast(part, tl.int64) * C + c) * (K * K)
    for q in tl.static_range(ROWS):
        taps = tl.sum(tl.gather(products[q], shifted, 2), 1)
        mask = (c < C)[:, None] & ((d < K) & (d * 0 + a + q < K))[None, :]
        tl.store(base[:, None] + (a + q) * K + d[None, :], taps, mask=mask)
    vector = tl.sum(tl.sum(added, 1), 0)
    if a == 0:
        tl.store(biases + tl.cast(part, tl.int64) * C + c, vector, mask=c < C)
