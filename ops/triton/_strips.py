"""What the depthwise kernels that stream rows are made of.

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
    """Write COUNT pixels of a row; SUM "mean" adds them to `total`, "square" their squares."""
    for s in tl.static_range(COUNT):
        mask = inside & ((first + s >= 0) & (first + s < W))[:, None]
        tile = tiles[s].to(pixels.dtype.element_ty)
        tl.store(pixels + offset_of(s, stride, ALIGN), tile, mask=mask)
        if SUM != "":
            written = tl.where(mask, tile.to(tl.float32), 0.0)
            total += written * written if SUM == "square" else written
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
