"""Depthwise convolutions that stream rows: a result, and the gradient of the input.

A strip is SPAN columns of an image. A program serves GROUPS strips side by side, BLOCK_C channels,
and a number of rows: its tiles are `(GROUPS, BLOCK_C)`, one for each column of the strip. It reads
every row of the input once, column by column, and adds it to the K rows of the result that it is a
part of. These move up by one with each row, and the first, which is then complete, is written. So a
pixel is loaded and activated (SPAN + K - 1) / SPAN times, whatever the kernel.

Strides, and C, count units of ALIGN elements: so the compiler knows how wide to load.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from ._activations import activate, derivative

# one compilation serves all of these
SIZES = [
    "x_b", "x_y", "x_x", "other_b", "other_y", "other_x", "grad_b", "grad_y", "grad_x",
    "H", "W", "OUT_H", "OUT_W", "C", "pad_y", "pad_x", "problems", "strips", "rows", "chunks",
]  # fmt: skip


@triton.jit
def locate_strips(block, problems, strips, GROUPS: tl.constexpr, SPAN: tl.constexpr):
    """Images and first columns of a block of strips, and which of them exist."""
    strip = block * GROUPS + tl.arange(0, GROUPS)
    return (strip // strips).to(tl.int64), strip % strips * SPAN, strip < problems


@triton.jit
def locate_pixels(ptr, image, first, c, stride_b, stride_x, ALIGN: tl.constexpr):
    """Channels c of the pixel in row 0 and column `first`, of each strip."""
    offsets = (image * stride_b + first.to(tl.int64) * stride_x) * ALIGN
    return ptr + offsets[:, None] + c[None, :]


@triton.jit
def offset_of(n, stride, ALIGN: tl.constexpr):
    """How far n rows or columns are apart."""
    return tl.cast(n, tl.int64) * stride * ALIGN


@triton.jit
def load_vector(ptr, start, c, C):
    """Channels c of the vector that begins at `start`, in float32; zero beyond and for None."""
    if ptr is None:
        vector = tl.zeros_like(c).to(tl.float32)
    else:
        vector = tl.load(ptr + start + c, mask=c < C, other=0.0).to(tl.float32)
    return vector


@triton.jit
def load_taps(
    weight, c, C, K: tl.constexpr, FLIP: tl.constexpr = False, RESIDUAL: tl.constexpr = False
):
    """The taps `(K * K, C)`, a vector each; turned around, and with one for the residual."""
    taps = ()
    for tap in tl.static_range(K * K):
        vector = load_vector(weight, (K * K - 1 - tap if FLIP else tap) * C, c, C)
        if RESIDUAL and tap == K * K // 2:
            vector += 1.0
        taps = taps + (vector,)
    return taps


@triton.jit
def columns(W, y, H):
    """The columns W of row y, none for rows outside the map."""
    return tl.where((y >= 0) & (y < H), W, 0)


@triton.jit
def load_span(
    pixels, stride, first, inside, W, ALIGN: tl.constexpr, COUNT: tl.constexpr, ACT: tl.constexpr
):
    """COUNT pixels of a row, from column `first` on, activated, in float32; zero outside."""
    tiles = ()
    for j in tl.static_range(COUNT):
        mask = inside & ((first + j >= 0) & (first + j < W))[:, None]
        tile = tl.load(pixels + offset_of(j, stride, ALIGN), mask=mask, other=0.0)
        tiles = tiles + (activate(tile.to(tl.float32), ACT),)
    return tiles


@triton.jit
def store_span(
    pixels, stride, tiles, first, inside, W, total,
    ALIGN: tl.constexpr, COUNT: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Write COUNT pixels of a row; with SUM, add what was written to `total`."""
    for s in tl.static_range(COUNT):
        mask = inside & ((first + s >= 0) & (first + s < W))[:, None]
        tile = tiles[s].to(pixels.dtype.element_ty)
        tl.store(pixels + offset_of(s, stride, ALIGN), tile, mask=mask)
        if SUM:
            total += tl.where(mask, tile.to(tl.float32), 0.0)
    return total


@triton.jit
def zeros(COUNT: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """COUNT tiles of zeros."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((GROUPS, BLOCK_C), tl.float32),)
    return tiles


@triton.jit
def add_row(sums, tiles, taps, K: tl.constexpr, SPAN: tl.constexpr):
    """Add a row of the input to the K rows of sums that it is a part of."""
    added = ()
    for i in tl.static_range(K):
        for s in tl.static_range(SPAN):
            total = sums[i * SPAN + s]
            for dx in tl.static_range(K):
                total += tiles[s + dx] * taps[(K - 1 - i) * K + dx][None, :]
            added = added + (total,)
    return added


@triton.jit
def move_up(sums, K: tl.constexpr, SPAN: tl.constexpr):
    """Drop the first of K rows, and append one of zeros."""
    moved = ()
    for n in tl.static_range(SPAN, K * SPAN):
        moved = moved + (sums[n],)
    for _ in tl.static_range(SPAN):
        moved = moved + (tl.zeros_like(sums[0]),)
    return moved


@triton.jit
def finish(y, other, shift, JOB: tl.constexpr, ACT: tl.constexpr):
    """What is written for a sum y, see `emit_row`."""
    if JOB == "result":
        y = activate(y, ACT)
    elif JOB == "add":
        y = activate(y + other, ACT)
    elif JOB == "grad_sum":
        y = (other + shift) * derivative(y, ACT)
    else:
        tl.static_assert(JOB == "grad_input")
        y = y * derivative(other, ACT)
    return y


@triton.jit
def emit_row(
    out, out_x, other, other_x, sums, bias, shift, total, first, inside, W,
    JOB: tl.constexpr, ACT: tl.constexpr, ALIGN: tl.constexpr, SPAN: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Finish a row of sums and write it.

    JOB "result" applies ACT, "add" adds pixels of `other` before. "grad_sum" takes `other` and the
    vectors `shift` as the gradient of what ACT returns, "grad_input" takes `other` as what ACT
    took.
    """
    others = sums
    if JOB != "result":
        others = load_span(other, other_x, first, inside, W, ALIGN, SPAN, "")
    tiles = ()
    for s in tl.static_range(SPAN):
        tiles = tiles + (finish(sums[s] + bias[None, :], others[s], shift, JOB, ACT),)
    return store_span(out, out_x, tiles, first, inside, W, total, ALIGN, SPAN, SUM)


@triton.jit
def load_shift(shift, image, inside, c, C, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Vectors of images, from `(B, C)` in float32; zeros for None."""
    if shift is None:
        tile = tl.zeros((GROUPS, BLOCK_C), tl.float32)
    else:
        tile = tl.load(shift + image[:, None] * C + c[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def store_sums(sums, total, image, strip, strips, chunks, inside, c, C):
    """Write the sums of strips, `(B, chunks * strips, C)`; not for None."""
    if sums is not None:
        entry = (image * chunks + tl.program_id(0) % chunks) * strips + strip
        tl.store(sums + entry[:, None] * C + c[None, :], total, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def depthwise_rows_kernel(
    x,  # (B, H, W, C)
    weight,  # (K * K, C)
    bias,  # (C,) or None
    other,  # (B, H, W, C) or None, see `emit_row`
    shift,  # (B, C), float32, or None
    out,  # (B, H, W, C)
    sums,  # (B, chunks * strips, C), float32, or None: sums of `out`
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
    ALIGN: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPAN: tl.constexpr,
):
    PAD: tl.constexpr = K // 2
    SUM: tl.constexpr = sums is not None
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
    sums,  # (B, chunks * strips, C), float32, or None: sums of `out`
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
    ALIGN: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPAN: tl.constexpr,
):
    SUM: tl.constexpr = sums is not None
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
                even, nothing, unused, unused, column, inside, W, JOB, ACT, ALIGN, 2 * SPAN, False,
            )  # fmt: skip
        if y + 1 < H:
            emit_row(
                target + offset_of(y + 1, W * C, ALIGN), C,
                beside + offset_of(y + 1, other_y, ALIGN), other_x,
                odd, nothing, unused, unused, column, inside, W, JOB, ACT, ALIGN, 2 * SPAN, False,
            )  # fmt: skip
