"""Neighborhood attention: what its kernels share, and the forward pass.

Along an axis pixels of one residue of the dilation are neighbors of each other only; they are
counted by their position among those, in the map that the shift of the head has rolled. An axis is
a tuple `(length, dilation, residue, count, shift)`, `count` the number of its positions. A program
owns TILE x TILE positions of one image and head and goes through those around them in blocks of
BLOCK_Y x BLOCK_X: tiles of scores are `(TILE * TILE, BLOCK_Y * BLOCK_X)`, with a mask of the pairs
that are neighbors. Nothing is rolled, padded or copied.

Heads of more channels than BLOCK_D are taken in parts: the scores are sums over all of them, and
each part of the result has its own program.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._bands import count_positions, first_query, last_query
from ._tokens import LOG2E

# one compilation serves all of these
SIZES = [
    "heads", "H", "W", "dilation_y", "dilation_x", "blocks_y", "blocks_x",
    "period", "shift_0", "shift_1", "shift_2", "shift_3",
]  # fmt: skip
# below all finite scores, and not infinite: the difference of two is a number
FLOOR = tl.constexpr(-3.0e38)
# the position of what has no neighbors
NOWHERE = tl.constexpr(1 << 30)


@triton.jit
def axis_of(length, dilation, residue, shift):
    """The positions of a residue along an axis."""
    return length, dilation, residue, count_positions(length, residue, dilation), shift


@triton.jit
def locate_tile(
    heads, H, W, dilation_y, dilation_x, blocks_y, blocks_x,
    period, shift_0, shift_1, shift_2, shift_3, TILE: tl.constexpr,
):  # fmt: skip
    """Image and head of a program, as one number, its axes, and the first position of its tile.

    Shifts are pixel numbers; the heads take `period` of them in turn.
    """
    blocks = blocks_y * blocks_x
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    across = tl.minimum(dilation_x, W)
    residues = tl.minimum(dilation_y, H) * across
    residue, problem = rest % residues, rest // residues
    turn = problem % heads % period
    shift = tl.where(turn < 2, tl.where(turn == 0, shift_0, shift_1),
                     tl.where(turn == 2, shift_2, shift_3))  # fmt: skip
    rows = axis_of(H, dilation_y, residue // across, shift // W)
    cols = axis_of(W, dilation_x, residue % across, shift % W)
    return problem.to(tl.int64), rows, cols, block // blocks_x * TILE, block % blocks_x * TILE


@triton.jit
def to_image(position, axis):
    """Rows or columns of the image that positions are; those behind the last may lie outside."""
    length, dilation, residue, _, shift = axis
    rolled = position * dilation + residue + shift
    return tl.where(rolled >= length, rolled - length, rolled).to(tl.int64)


@triton.jit
def window_start(position, axis, K: tl.constexpr, CLAMP: tl.constexpr):
    """First position of the window of a position; may lie outside without CLAMP."""
    start = position - K // 2
    if CLAMP:
        start = tl.minimum(tl.maximum(start, 0), axis[3] - K)
    return start


@triton.jit
def keys_of(first, axis, K: tl.constexpr, CLAMP: tl.constexpr, TILE: tl.constexpr):
    """The first key of a tile of queries, and the one behind the last."""
    last = tl.minimum(first + TILE, axis[3]) - 1
    begin = tl.maximum(window_start(first, axis, K, CLAMP), 0)
    return begin, tl.minimum(window_start(last, axis, K, CLAMP) + K, axis[3])


@triton.jit
def queries_of(first, axis, K: tl.constexpr, CLAMP: tl.constexpr, TILE: tl.constexpr):
    """The first query that sees a tile of keys, and the one behind the last."""
    count = axis[3]
    last = tl.minimum(first + TILE, count) - 1
    if CLAMP:
        begin, end = first_query(first, K), last_query(last, count, K) + 1
    else:
        begin, end = tl.maximum(first - K // 2, 0), tl.minimum(last + K // 2 + 1, count)
    return begin, end


@triton.jit
def blocks_in(begin, end, BLOCK: tl.constexpr, MOST: tl.constexpr):
    """Blocks from `begin` to `end`, of which at most MOST apart; one where all fit."""
    return 1 if MOST <= BLOCK else (end - begin + BLOCK - 1) // BLOCK


@triton.jit
def locate_block(step, across, top, left, rows, cols, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """Positions of a block, which of them exist, and their rows and columns of the image."""
    n = tl.arange(0, BLOCK_Y * BLOCK_X)
    y = top + step // across * BLOCK_Y + n // BLOCK_X
    x = left + step % across * BLOCK_X + n % BLOCK_X
    inside = (y < rows[3]) & (x < cols[3])
    return y, x, inside, to_image(y, rows), to_image(x, cols)


@triton.jit
def are_neighbors(key_y, key_x, start_y, start_x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which keys lie in windows; shapes are broadcast."""
    # a negative slot is a large one without sign
    slot_y, slot_x = (key_y - start_y).to(tl.uint32), (key_x - start_x).to(tl.uint32)
    return (slot_y < ROWS) & (slot_x < COLS)


@triton.jit
def load_channels(ptr, offsets, inside, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Channels of a head from `first` on, `(N, BLOCK_D)`; zeros outside."""
    d = first + tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if D % BLOCK_D != 0:
        mask = mask & (d < D)[None, :]
    return tl.load(ptr + offsets[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_channels(ptr, offsets, inside, first, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write channels of a head from `first` on."""
    d = first + tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if D % BLOCK_D != 0:
        mask = mask & (d < D)[None, :]
    tl.store(ptr + offsets[:, None] + d[None, :], values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def products(
    own, owned, at, inside, other, other_at, other_inside,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of tokens over all channels; `own` are those of the first, if they are not many."""
    if D <= BLOCK_D:
        tokens = load_channels(other, other_at, other_inside, 0, D, BLOCK_D)
        total = tl.dot(own, tl.trans(tokens), input_precision=PRECISION)
    else:
        total = tl.zeros((at.shape[0], other_at.shape[0]), tl.float32)
        for first in range(0, D, BLOCK_D):
            some = load_channels(owned, at, inside, first, D, BLOCK_D)
            tokens = load_channels(other, other_at, other_inside, first, D, BLOCK_D)
            total += tl.dot(some, tl.trans(tokens), input_precision=PRECISION)
    return total


@triton.jit
def count_valid(position, axis, K: tl.constexpr):
    """Positions of a window that lie on the axis."""
    valid = tl.minimum(position + K // 2, axis[3] - 1) - tl.maximum(position - K // 2, 0) + 1
    return tl.maximum(valid, 0)


@triton.jit(do_not_specialize=SIZES)
def neighborhood_fwd_kernel(
    qkv,  # (B, H, W, 3C)
    out,  # (B, H, W, C), contiguous
    lse,  # (B, heads, H, W), base 2
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
    """Outputs of a tile of queries, BLOCK_D channels, and their logsumexp with all zeros around."""
    problem, rows, cols, first_y, first_x = locate_tile(
        heads, H, W, dilation_y, dilation_x, blocks_y, blocks_x,
        period, shift_0, shift_1, shift_2, shift_3, TILE,
    )  # fmt: skip
    batch, head = problem // heads, problem % heads
    part = tl.program_id(1) * BLOCK_D
    queries = qkv + batch * stride_b + head * D
    keys, values = queries + heads * D, queries + 2 * (heads * D)
    y, x, is_query, image_y, image_x = locate_block(0, 1, first_y, first_x, rows, cols, TILE, TILE)
    at = image_y * stride_y + image_x * stride_x
    q = load_channels(queries, at, is_query, 0, D, BLOCK_D)
    start_y, start_x = window_start(y, rows, ROWS, CLAMP), window_start(x, cols, COLS, CLAMP)

    top = tl.full((TILE * TILE,), FLOOR, tl.float32)
    total = tl.zeros((TILE * TILE,), tl.float32)
    if not CLAMP:
        # zeros outside the map are keys of score 0
        valid = count_valid(y, rows, ROWS) * count_valid(x, cols, COLS)
        total = (ROWS * COLS - valid).to(tl.float32)
        top = tl.where(total > 0, 0.0, FLOOR)
    mixed = tl.zeros((TILE * TILE, BLOCK_D), tl.float32)
    upper, lower = keys_of(first_y, rows, ROWS, CLAMP, TILE)
    left, right = keys_of(first_x, cols, COLS, CLAMP, TILE)
    across = blocks_in(left, right, BLOCK_X, TILE + COLS - 1)
    for step in range(0, (lower - upper + BLOCK_Y - 1) // BLOCK_Y * across):
        key_y, key_x, is_key, key_row, key_col = locate_block(
            step, across, upper, left, rows, cols, BLOCK_Y, BLOCK_X
        )
        keys_at = key_row * stride_y + key_col * stride_x
        scores = products(
            q, queries, at, is_query, keys, keys_at, is_key, D, BLOCK_D, PRECISION
        ) * (scale * LOG2E)  # fmt: skip
        key_y = tl.where(is_key, key_y, NOWHERE)
        seen = are_neighbors(
            key_y[None, :], key_x[None, :], start_y[:, None], start_x[:, None], ROWS, COLS
        )
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        rescale = tl.exp2(top - new_top)
        v = load_channels(values, keys_at, is_key, part, D, BLOCK_D)
        total = total * rescale + tl.sum(weights, 1)
        mixed = mixed * rescale[:, None]
        mixed += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = new_top
    pixels = image_y * W + image_x
    image = out + batch * H * W * (heads * D) + head * D
    store_channels(image, pixels * (heads * D), is_query, part, mixed / total[:, None], D, BLOCK_D)
    if part == 0:
        tl.store(lse + problem * H * W + pixels, top + tl.log2(total), mask=is_query)
