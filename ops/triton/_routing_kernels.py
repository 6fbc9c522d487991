"""Routing attention by lists of regions: a program reads the regions that one region chose.

Tiles of scores are `(BLOCK_M, BLOCK_N)`, queries by keys. Tokens of a list are counted on through
its regions, so that only the last tile is not full whatever the size of a region. The gradient of
keys and values goes through the lists turned round: of the regions that chose one.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._routing_tokens import locate, locate_listed, store_outside, weights_and_ds
from ._tokens import LN2, LOG2E, load_tokens, store_tokens

# one compilation serves all of these
SIZES = ["H", "W", "R", "cols", "h", "w", "topk"]


@triton.jit(do_not_specialize=SIZES)
def routing_fwd_kernel(
    qkv,  # (B, H, W, 3C)
    regions,  # (B, R, topk)
    pad,  # (3C,) or None
    out,  # (B, H, W, C)
    lse,  # (B, H, W, heads)
    stride_b,
    stride_y,
    stride_x,
    H,
    W,
    R,
    cols,
    h,
    w,
    topk,
    scale,
    C,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t = h * w
    blocks = (t + BLOCK_M - 1) // BLOCK_M
    heads = C // D
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(0) // blocks % heads
    region = tl.program_id(0) // (blocks * heads)
    image, start = region // R, head * D
    numbers = regions + tl.cast(region, tl.int64) * topk

    tokens, pixels, is_query = locate(
        image, region % R, m, m < t, H, W, cols, h, w, stride_b, stride_y, stride_x
    )
    q = load_tokens(qkv, None, start, tokens, is_query, D, BLOCK_D)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    values = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, topk * t, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        keys, _, inside, is_key = locate_listed(
            image, numbers, n, topk, H, W, cols, h, w, stride_b, stride_y, stride_x
        )
        k = load_tokens(qkv, pad, start + C, keys, inside, D, BLOCK_D)
        v = load_tokens(qkv, pad, start + 2 * C, keys, inside, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        # finite: no tile is without keys
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(weights, 1)
        values = values * rescale[:, None]
        values += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = new_top
    store_tokens(out, start, pixels * C, is_query, values / total[:, None], D, BLOCK_D)
    tl.store(lse + pixels * heads + head, (top + tl.log2(total)) * LN2, mask=is_query)


@triton.jit(do_not_specialize=SIZES)
def routing_queries_kernel(
    grad,  # (B, H, W, C)
    qkv,  # (B, H, W, 3C)
    regions,  # (B, R, topk)
    pad,  # (3C,) or None
    out,  # (B, H, W, C)
    lse,  # (B, H, W, heads)
    delta,  # (B, H, W, heads), written: rowsum(grad * out)
    grad_qkv,  # (B, H, W, 3C), the queries' part written
    stride_b,
    stride_y,
    stride_x,
    H,
    W,
    R,
    cols,
    h,
    w,
    topk,
    scale,
    C,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t = h * w
    blocks = (t + BLOCK_M - 1) // BLOCK_M
    heads = C // D
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(0) // blocks % heads
    region = tl.program_id(0) // (blocks * heads)
    image, start = region // R, head * D
    numbers = regions + tl.cast(region, tl.int64) * topk

    tokens, pixels, is_query = locate(
        image, region % R, m, m < t, H, W, cols, h, w, stride_b, stride_y, stride_x
    )
    q = load_tokens(qkv, None, start, tokens, is_query, D, BLOCK_D)
    g = load_tokens(grad, None, start, pixels * C, is_query, D, BLOCK_D)
    o = load_tokens(out, None, start, pixels * C, is_query, D, BLOCK_D)
    row_delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + pixels * heads + head, row_delta, mask=is_query)
    row_lse = tl.load(lse + pixels * heads + head, mask=is_query, other=float("inf"))
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, topk * t, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        keys, _, inside, is_key = locate_listed(
            image, numbers, n, topk, H, W, cols, h, w, stride_b, stride_y, stride_x
        )
        k = load_tokens(qkv, pad, start + C, keys, inside, D, BLOCK_D)
        v = load_tokens(qkv, pad, start + 2 * C, keys, inside, D, BLOCK_D)
        _, ds = weights_and_ds(q, k, v, g, row_lse, row_delta, is_key[None, :], scale, PRECISION)
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    store_tokens(grad_qkv, start, pixels * 3 * C, is_query, dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def routing_keys_kernel(
    grad,  # (B, H, W, C)
    qkv,  # (B, H, W, 3C)
    lists,  # (B, R, R): the regions that chose a region come first
    counts,  # (B, R): how many they are
    pad,  # (3C,) or None
    lse,  # (B, H, W, heads)
    delta,  # (B, H, W, heads)
    grad_qkv,  # (B, H, W, 3C), the keys' and values' part written
    grad_pad,  # (B * R * blocks, 2C) or None
    stride_b,
    stride_y,
    stride_x,
    H,
    W,
    R,
    cols,
    h,
    w,
    scale,
    C,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t = h * w
    blocks = (t + BLOCK_N - 1) // BLOCK_N
    heads = C // D
    block = tl.program_id(0) % blocks
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(0) // blocks % heads
    region = tl.program_id(0) // (blocks * heads)
    image, start = region // R, head * D
    numbers = lists + tl.cast(region, tl.int64) * R
    count = tl.load(counts + region)

    keys, key_pixels, inside = locate(
        image, region % R, n, n < t, H, W, cols, h, w, stride_b, stride_y, stride_x
    )
    k = load_tokens(qkv, pad, start + C, keys, inside, D, BLOCK_D)
    v = load_tokens(qkv, pad, start + 2 * C, keys, inside, D, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, count * t, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        tokens, pixels, is_query, _ = locate_listed(
            image, numbers, m, count, H, W, cols, h, w, stride_b, stride_y, stride_x
        )
        q = load_tokens(qkv, None, start, tokens, is_query, D, BLOCK_D)
        g = load_tokens(grad, None, start, pixels * C, is_query, D, BLOCK_D)
        row_lse = tl.load(lse + pixels * heads + head, mask=is_query, other=float("inf"))
        row_delta = tl.load(delta + pixels * heads + head, mask=is_query, other=0.0)
        weights, ds = weights_and_ds(
            q, k, v, g, row_lse, row_delta, is_query[:, None], scale, PRECISION
        )
        dv += tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision=PRECISION)
        dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
    dk *= scale
    store_tokens(grad_qkv, start + C, key_pixels * 3 * C, inside, dk, D, BLOCK_D)
    store_tokens(grad_qkv, start + 2 * C, key_pixels * 3 * C, inside, dv, D, BLOCK_D)
    if grad_pad is not None:
        outside = ~inside & (n < t)
        store_outside(grad_pad, region * blocks + block, start, C, outside, dk, dv, D, BLOCK_D)


@triton.jit(do_not_specialize=["R", "topk"])
def routing_lists_kernel(
    regions,  # (B, R, topk)
    lists,  # (B, R, R), written as far as a list goes
    counts,  # (B, R)
    R,
    topk,
    BLOCK: tl.constexpr,
):
    chosen = tl.program_id(0)
    image = tl.cast(chosen // R, tl.int64)
    count = tl.full((), 0, tl.int32)
    for first in range(0, R, BLOCK):
        r = first + tl.arange(0, BLOCK)
        hits = tl.zeros((BLOCK,), tl.int32)
        for slot in range(0, topk):
            choice = tl.load(regions + (image * R + r) * topk + slot, mask=r < R, other=-1)
            hits += (choice == chosen % R).to(tl.int32)
        places = count + tl.cumsum(hits, 0) - 1
        tl.store(lists + tl.cast(chosen, tl.int64) * R + places, r, mask=hits > 0)
        count += tl.sum(hits, 0)
    tl.store(counts + chosen, count)
