"""Routing attention over all tokens of an image, for small regions: scores of pairs are masked.

With few tokens in a region, tiles of lists are mostly empty and keys are read many times. Here
tokens are numbered region by region, a program reads them all, and a mask of 64 bits for each
region says which regions it chose. Tiles of scores are `(BLOCK_M, BLOCK_N)`, queries by keys.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._routing_tokens import locate, store_outside, weights_and_ds
from ._tokens import LN2, LOG2E, load_tokens, store_tokens

# one compilation serves all of these
SIZES = ["H", "W", "R", "cols", "h", "w"]


@triton.jit
def chose(masks, regions):
    """Whether the masks of queries have the bits of the regions of keys."""
    return (masks[:, None] >> regions[None, :]) & 1 != 0


@triton.jit(do_not_specialize=SIZES)
def routing_dense_fwd_kernel(
    qkv,  # (B, H, W, 3C)
    masks,  # (B, R)
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
    scale,
    C,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t = h * w
    count = R * t
    blocks = (count + BLOCK_M - 1) // BLOCK_M
    heads = C // D
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(0) // blocks % heads
    image = tl.program_id(0) // (blocks * heads)
    start = head * D

    tokens, pixels, is_query = locate(
        image, m // t, m % t, m < count, H, W, cols, h, w, stride_b, stride_y, stride_x
    )
    q = load_tokens(qkv, None, start, tokens, is_query, D, BLOCK_D)
    # rows that are no queries see all, so that their sums are not zero
    mask = tl.load(masks + image * R + m // t, mask=is_query, other=-1)
    # finite, so that tiles without a visible key change nothing
    top = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    values = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, count, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        keys, _, inside = locate(
            image, n // t, n % t, n < count, H, W, cols, h, w, stride_b, stride_y, stride_x
        )
        k = load_tokens(qkv, pad, start + C, keys, inside, D, BLOCK_D)
        v = load_tokens(qkv, pad, start + 2 * C, keys, inside, D, BLOCK_D)
        visible = chose(mask, tl.where(n < count, n // t, 0)) & (n < count)[None, :]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where(visible, scores, float("-inf"))
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
def routing_dense_bwd_kernel(
    grad,  # (B, H, W, C)
    qkv,  # (B, H, W, 3C)
    masks,  # (B, R)
    pad,  # (3C,) or None
    out,  # (B, H, W, C)
    lse,  # (B, H, W, heads)
    grad_qkv,  # (B, H, W, 3C)
    grad_pad,  # (B * blocks, 2C) or None
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
    count = R * t
    blocks = (count + BLOCK_M - 1) // BLOCK_M
    heads = C // D
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(0) // blocks % heads
    image = tl.program_id(0) // (blocks * heads)
    start = head * D

    # the tokens of this program, which are queries of all others and keys of all others
    tokens, pixels, inside = locate(
        image, m // t, m % t, m < count, H, W, cols, h, w, stride_b, stride_y, stride_x
    )
    own_q = load_tokens(qkv, None, start, tokens, inside, D, BLOCK_D)
    own_k = load_tokens(qkv, pad, start + C, tokens, inside, D, BLOCK_D)
    own_v = load_tokens(qkv, pad, start + 2 * C, tokens, inside, D, BLOCK_D)
    own_g = load_tokens(grad, None, start, pixels * C, inside, D, BLOCK_D)
    own_o = load_tokens(out, None, start, pixels * C, inside, D, BLOCK_D)
    own_delta = tl.sum(own_g.to(tl.float32) * own_o.to(tl.float32), 1)
    own_lse = tl.load(lse + pixels * heads + head, mask=inside, other=float("inf"))
    own_mask = tl.load(masks + image * R + m // t, mask=inside, other=0)
    own_region = tl.where(m < count, m // t, 0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, count, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        others, at, is_query = locate(
            image, n // t, n % t, n < count, H, W, cols, h, w, stride_b, stride_y, stride_x
        )
        k = load_tokens(qkv, pad, start + C, others, is_query, D, BLOCK_D)
        v = load_tokens(qkv, pad, start + 2 * C, others, is_query, D, BLOCK_D)
        visible = chose(own_mask, tl.where(n < count, n // t, 0)) & (n < count)[None, :]
        _, ds = weights_and_ds(own_q, k, v, own_g, own_lse, own_delta, visible, scale, PRECISION)
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)

        q = load_tokens(qkv, None, start, others, is_query, D, BLOCK_D)
        g = load_tokens(grad, None, start, at * C, is_query, D, BLOCK_D)
        o = load_tokens(out, None, start, at * C, is_query, D, BLOCK_D)
        delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        row_lse = tl.load(lse + at * heads + head, mask=is_query, other=float("inf"))
        mask = tl.load(masks + image * R + n // t, mask=is_query, other=0)
        weights, ds = weights_and_ds(
            q, own_k, own_v, g, row_lse, delta, chose(mask, own_region), scale, PRECISION
        )
        dv += tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision=PRECISION)
        dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
    dk *= scale
    store_tokens(grad_qkv, start, pixels * 3 * C, inside, dq * scale, D, BLOCK_D)
    store_tokens(grad_qkv, start + C, pixels * 3 * C, inside, dk, D, BLOCK_D)
    store_tokens(grad_qkv, start + 2 * C, pixels * 3 * C, inside, dv, D, BLOCK_D)
    if grad_pad is not None:
        row = image * blocks + tl.program_id(0) % blocks
        store_outside(grad_pad, row, start, C, ~inside & (m < count), dk, dv, D, BLOCK_D)
