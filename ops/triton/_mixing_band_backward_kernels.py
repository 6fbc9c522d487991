"""Dynamic mixing row by row, backward: gradients of the generated kernels, logits and values."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._bands import first_query, last_query, load_pixels, store_pixels, window_start
from ._mixing_band_kernels import (
    SIZES,
    collect,
    load_added,
    load_lse,
    load_slots,
    locate_queries,
    spread,
)
from ._tokens import LOG2E, fit


@triton.jit(do_not_specialize=[*SIZES, "batch_size", "images", "parts", "chunk"])
def mixing_band_kernel_kernel(
    grad,  # (B, H, W, C), from the first channel on
    query,  # (B, H, W, heads * D)
    kernel,  # (B, heads, D, S), from the first slot on
    value,  # (B, H, W, C), from the first channel on
    bias,  # (S,), from the first slot on
    table,  # (heads, 2K - 1, 2K - 1)
    lse,  # (B, heads, H, W)
    delta,  # (B, heads, H, W)
    grad_kernels,  # (parts * blocks, B, heads, D, K * K)
    grad_logits,  # (programs of images, heads, K - 1 + parts, W, K * K), zeros
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
    batch_size,
    images,
    parts,
    chunk,
    C,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one row of slots of the kernels, and of its logits summed over images.

    A program serves BLOCK_Q columns of queries, of a part of the rows of the map, of some images.
    Rows that have the same slot in their own window are summed: those near borders are alone.
    """
    index = tl.program_id(0)
    a, index = index % K, index // K
    head, index = index % heads, index // heads
    first, part = index % blocks * BLOCK_Q, index // blocks
    head = head.to(tl.int64)
    x, inside, start = locate_queries(first, W, K, BLOCK_Q)
    leftmost = window_start(first, W, K)
    key = leftmost + tl.arange(0, BLOCK_K)
    slot = tl.arange(0, BLOCK_S)
    seen = (start - leftmost)[:, None] + slot[None, :]
    own_x = tl.minimum(x, W - 1) - start
    channels = tl.arange(0, BLOCK_D)
    query += head * D
    grad += head * D
    value += head * D
    kernel += head * kernel_h
    table += head * (2 * K - 1) * (2 * K - 1)
    group = tl.program_id(1)
    grad_logits += (group.to(tl.int64) * heads + head) * (K - 1 + parts) * W * K * K + a * K
    logits_at = x[:, None] * (K * K) + slot[None, :]
    logits_mask = inside[:, None] & (slot < K)[None, :]
    for image in range(group * images, tl.minimum(group * images + images, batch_size)):
        batch = tl.cast(image, tl.int64)
        m = load_slots(kernel + batch * kernel_b, kernel_d, a, D, K, BLOCK_D, BLOCK_S)
        total = tl.zeros((BLOCK_D, BLOCK_S), tl.float32)
        for own_y in range(0, K):
            # the rows of this own slot, of those of this part
            begin = tl.where(own_y <= K // 2, own_y, H - K + own_y)
            end = tl.where(own_y == K // 2, H - K // 2, begin + 1)
            begin, end = tl.maximum(begin, part * chunk), tl.minimum(end, part * chunk + chunk)
            added = load_added(bias, table, a, own_y, own_x, K, BLOCK_S)
            pairs = tl.zeros((BLOCK_Q, BLOCK_S), tl.float32)
            for y in range(begin, end):
                rows = ((batch * heads + head) * H + y) * W + x
                pixels = (batch * H + y) * W
                line = batch * query_b + tl.cast(y, tl.int64) * query_y
                q = load_pixels(query + line, x, query_x, channels, inside, D)
                g = load_pixels(grad + pixels * C, x, C, channels, inside, D)
                line = batch * value_b + tl.cast(y - own_y + a, tl.int64) * value_y
                v = load_pixels(value + line, key, value_x, channels, key < W, D)
                summed = load_lse(lse, rows, inside)
                products = tl.load(delta + rows, mask=inside, other=0.0)
                logits = tl.dot(q, m, input_precision=PRECISION) * LOG2E + added
                weights = tl.exp2(logits - summed[:, None])
                dweights = tl.dot(g, tl.trans(v), input_precision=PRECISION)
                dlogits = weights * (collect(dweights, seen, BLOCK_K) - products[:, None])
                pairs += dlogits
                dlogits, unit = fit(dlogits, q.dtype)
                total += tl.dot(tl.trans(q), dlogits, input_precision=PRECISION) * unit
            if end > begin:
                place = own_y + tl.where(own_y == K // 2, part, 0)
                place += tl.where(own_y > K // 2, parts - 1, 0)
                sums = grad_logits + tl.cast(place, tl.int64) * W * K * K + logits_at
                pairs += tl.load(sums, mask=logits_mask, other=0.0)
                tl.store(sums, pairs, mask=logits_mask)
        problem = (part * blocks + first // BLOCK_Q).to(tl.int64) * batch_size + batch
        rows_at = grad_kernels + (problem * heads + head) * D * K * K + a * K
        mask = (channels < D)[:, None] & (slot < K)[None, :]
        tl.store(rows_at + channels[:, None] * (K * K) + slot[None, :], total, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def mixing_band_value_kernel(
    grad,  # (B, H, W, C), from the first channel on
    query,  # (B, H, W, heads * D)
    kernel,  # (B, heads, D, S), from the first slot on
    bias,  # (S,), from the first slot on
    table,  # (heads, 2K - 1, 2K - 1)
    lse,  # (B, heads, H, W)
    grad_value,  # (B, H, W, C), from the first channel on
    query_b,
    query_y,
    query_x,
    kernel_b,
    kernel_h,
    kernel_d,
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
    """Gradients of BLOCK_K neighboring values of a row, from all queries that see them."""
    index = tl.program_id(0)
    first, row = index % blocks * BLOCK_K, index // blocks
    problem, key_y = (row // H).to(tl.int64), row % H
    batch, head = problem // heads, problem % heads
    key = first + tl.arange(0, BLOCK_K)
    left = first_query(first, K)
    right = last_query(tl.minimum(first + BLOCK_K, W) - 1, W, K)
    channels = tl.arange(0, BLOCK_D)
    query += batch * query_b + head * D
    kernel += batch * kernel_b + head * kernel_h
    table += head * (2 * K - 1) * (2 * K - 1)
    grad += head * D
    total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for y in range(first_query(key_y, K), last_query(key_y, H, K) + 1):
        top = window_start(y, H, K)
        a = key_y - top
        m = load_slots(kernel, kernel_d, a, D, K, BLOCK_D, BLOCK_S)
        for begin in range(left, right + 1, BLOCK_Q):
            x, inside, start = locate_queries(begin, W, K, BLOCK_Q)
            own_x = tl.minimum(x, W - 1) - start
            q = load_pixels(query + tl.cast(y, tl.int64) * query_y, x, query_x, channels, inside, D)
            g = load_pixels(grad + (batch * H + y) * W * C, x, C, channels, inside, D)
            rows = (problem * H + y) * W + x
            summed = load_lse(lse, rows, inside)
            logits = tl.dot(q, m, input_precision=PRECISION) * LOG2E
            logits += load_added(bias, table, a, y - top, own_x, K, BLOCK_S)
            weights = tl.exp2(logits - summed[:, None])
            band = spread(weights, key[None, :] - start[:, None], K).to(g.dtype)
            total += tl.dot(tl.trans(band), g, input_precision=PRECISION)
    grad_value += (batch * H + key_y) * W * C + head * D
    store_pixels(grad_value, key, C, channels, key < W, total, D)
