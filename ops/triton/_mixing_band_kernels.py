"""Dynamic mixing row by row, forward, and the gradient of the queries.

A program serves one head of one image and BLOCK_Q neighboring queries of a row of its map. It goes
through the rows of their windows: logits `(BLOCK_Q, BLOCK_S)` of the slots of a row are a product
with the generated kernels, and weights, moved to where their keys lie, a banded matrix
`(BLOCK_Q, BLOCK_K)`; see `_bands.py`.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._bands import load_pixels, store_pixels, window_start
from ._tokens import LN2, LOG2E, fit

# one compilation serves all of these
SIZES = ["H", "W", "heads", "blocks"]


@triton.jit
def locate_queries(first, W, K: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Columns of queries, which are in the map, and where their windows start.

    Queries beyond the map have the window of the last one.
    """
    x = first + tl.arange(0, BLOCK_Q)
    return x, x < W, window_start(tl.minimum(x, W - 1), W, K)


@triton.jit
def load_slots(
    kernel,
    stride_d,
    a,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Row a of the slots of the generated kernels of a head, `(BLOCK_D, BLOCK_S)`."""
    d, slot = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    mask = (d < D)[:, None] & (slot < K)[None, :]
    return tl.load(kernel + d[:, None] * stride_d + a * K + slot[None, :], mask=mask, other=0.0)


@triton.jit
def load_added(bias, table, a, own_y, own_x, K: tl.constexpr, BLOCK_S: tl.constexpr):
    """What is added to logits of base 2 of row a, `(queries, BLOCK_S)`; hides slots beyond K.

    Queries have the slots `own_y` and `own_x` of their windows.
    """
    slot = tl.arange(0, BLOCK_S)
    vector = tl.load(bias + a * K + slot, mask=slot < K, other=float("-inf"))
    row = table + (a - own_y + K - 1) * (2 * K - 1)
    column = slot[None, :] - own_x[:, None] + K - 1
    position = tl.load(row + column, mask=(slot < K)[None, :], other=0.0)
    return (vector[None, :] + position) * LOG2E


@triton.jit
def load_lse(lse, rows, inside):
    """The logsumexp of base 2 of queries; those beyond the map get weights of zero by it."""
    return tl.load(lse + rows, mask=inside, other=float("inf")) * LOG2E


@triton.jit
def spread(weights, slot, K: tl.constexpr):
    """Weights `(queries, BLOCK_S)` where the keys lie: `slot` `(queries, keys)`, zeros beyond."""
    inside = (slot >= 0) & (slot < K)
    return tl.where(inside, tl.gather(weights, tl.where(inside, slot, 0), 1), 0.0)


@triton.jit
def collect(products, key, BLOCK_K: tl.constexpr):
    """Products `(queries, keys)` at the keys of the slots, `key` `(queries, BLOCK_S)`.

    Slots beyond the window, whose keys may be none, get those of another one.
    """
    return tl.gather(products, tl.minimum(key, BLOCK_K - 1), 1)


@triton.jit(do_not_specialize=SIZES)
def mixing_band_fwd_kernel(
    query,  # (B, H, W, heads * D)
    kernel,  # (B, heads, D, S), from the first slot on
    value,  # (B, H, W, C), from the first channel on
    bias,  # (S,), from the first slot on
    table,  # (heads, 2K - 1, 2K - 1)
    out,  # (B, H, W, C), from the first channel on
    lse,  # (B, heads, H, W)
    query_b,
    query_y,
    query_x,
    kernel_b,
    kernel_h,
    kernel_d,
    value_b,
    value_y,
    value_x,
    H,
    W,
    heads,
    blocks,
    C,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    index = tl.program_id(0)
    first, row = index % blocks * BLOCK_Q, index // blocks
    problem, y = (row // H).to(tl.int64), row % H
    batch, head = problem // heads, problem % heads
    x, inside, start = locate_queries(first, W, K, BLOCK_Q)
    key = window_start(first, W, K) + tl.arange(0, BLOCK_K)
    slot = key[None, :] - start[:, None]
    own_x = tl.minimum(x, W - 1) - start
    top = window_start(y, H, K)
    channels = tl.arange(0, BLOCK_D)
    query += batch * query_b + tl.cast(y, tl.int64) * query_y + head * D
    kernel += batch * kernel_b + head * kernel_h
    value += batch * value_b + head * D
    table += head * (2 * K - 1) * (2 * K - 1)
    q = load_pixels(query, x, query_x, channels, inside, D)
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    count = tl.zeros((BLOCK_Q,), tl.float32)
    total = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for a in range(0, K):
        m = load_slots(kernel, kernel_d, a, D, K, BLOCK_D, BLOCK_S)
        logits = tl.dot(q, m, input_precision=PRECISION) * LOG2E
        logits += load_added(bias, table, a, y - top, own_x, K, BLOCK_S)
        larger = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - larger[:, None])
        shrink = tl.exp2(largest - larger)
        largest = larger
        count = count * shrink + tl.sum(weights, 1)
        v = value + tl.cast(top + a, tl.int64) * value_y
        v = load_pixels(v, key, value_x, channels, key < W, D)
        band = spread(weights, slot, K).to(v.dtype)
        total = total * shrink[:, None] + tl.dot(band, v, input_precision=PRECISION)
    out += (batch * H + y) * W * C + head * D
    store_pixels(out, x, C, channels, inside, total / count[:, None], D)
    lse += (problem * H + y) * W
    tl.store(lse + x, (largest + tl.log2(count)) * LN2, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def mixing_band_query_kernel(
    grad,  # (B, H, W, C), from the first channel on
    query,  # (B, H, W, heads * D)
    kernel,  # (B, heads, D, S), from the first slot on
    value,  # (B, H, W, C), from the first channel on
    bias,  # (S,), from the first slot on
    table,  # (heads, 2K - 1, 2K - 1)
    out,  # (B, H, W, C), from the first channel on
    lse,  # (B, heads, H, W)
    added,  # (B, H, W, heads * D) or None
    grad_query,  # (B, H, W, heads * D)
    delta,  # (B, heads, H, W), written: products of output and gradient
    query_b,
    query_y,
    query_x,
    kernel_b,
    kernel_h,
    kernel_d,
    value_b,
    value_y,
    value_x,
    H,
    W,
    heads,
    blocks,
    C,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the queries."""
    index = tl.program_id(0)
    first, row = index % blocks * BLOCK_Q, index // blocks
    problem, y = (row // H).to(tl.int64), row % H
    batch, head = problem // heads, problem % heads
    x, inside, start = locate_queries(first, W, K, BLOCK_Q)
    leftmost = window_start(first, W, K)
    key = leftmost + tl.arange(0, BLOCK_K)
    seen = (start - leftmost)[:, None] + tl.arange(0, BLOCK_S)[None, :]
    own_x = tl.minimum(x, W - 1) - start
    top = window_start(y, H, K)
    channels = tl.arange(0, BLOCK_D)
    query += batch * query_b + tl.cast(y, tl.int64) * query_y + head * D
    kernel += batch * kernel_b + head * kernel_h
    value += batch * value_b + head * D
    table += head * (2 * K - 1) * (2 * K - 1)
    pixels = (batch * H + y) * W
    q = load_pixels(query, x, query_x, channels, inside, D)
    g = load_pixels(grad + pixels * C + head * D, x, C, channels, inside, D)
    o = load_pixels(out + pixels * C + head * D, x, C, channels, inside, D)
    products = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    rows = (problem * H + y) * W + x
    tl.store(delta + rows, products, mask=inside)
    summed = load_lse(lse, rows, inside)
    total = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for a in range(0, K):
        m = load_slots(kernel, kernel_d, a, D, K, BLOCK_D, BLOCK_S)
        logits = tl.dot(q, m, input_precision=PRECISION) * LOG2E
        logits += load_added(bias, table, a, y - top, own_x, K, BLOCK_S)
        weights = tl.exp2(logits - summed[:, None])
        v = value + tl.cast(top + a, tl.int64) * value_y
        v = load_pixels(v, key, value_x, channels, key < W, D)
        dweights = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        dlogits = weights * (collect(dweights, seen, BLOCK_K) - products[:, None])
        dlogits, unit = fit(dlogits, m.dtype)
        total += tl.dot(dlogits, tl.trans(m), input_precision=PRECISION) * unit
    channel = head * D
    if added is not None:
        total += load_pixels(
            added + pixels * heads * D + channel, x, heads * D, channels, inside, D
        )
    grad_query += pixels * heads * D + channel
    store_pixels(grad_query, x, heads * D, channels, inside, total, D)
