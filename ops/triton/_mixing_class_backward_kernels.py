"""Dynamic mixing by classes, backward: what queries, slots and values get.

Weights are computed anew from the logsumexp of their logits; it is infinite in rows that are no
queries, so that their weights are zero whatever the bias.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._mixing_class_kernels import SIZES, load_added, load_kernels, locate_queries, offsets_of
from ._tokens import LOG2E, fit_along, load_tokens, store_tokens


@triton.jit(do_not_specialize=SIZES)
def mixing_class_queries_kernel(
    query,  # (B, H, W, C / 2)
    kernel,  # (B, G, D, S)
    value,  # (B, H, W, C)
    bias,  # (S,)
    table,  # (G, 2K - 1, 2K - 1)
    grad,  # (B, H, W, C)
    out,  # (B, H, W, C)
    lse,  # (B, G, H, W)
    delta,  # (B, G, H, W), written: the products of grad and out
    added_grad,  # (B, H, W, C / 2), float32, or None
    grad_query,  # (B, H, W, C / 2)
    query_b,
    query_y,
    query_x,
    kernel_b,
    kernel_g,
    kernel_d,
    value_b,
    value_y,
    value_x,
    H,
    W,
    heads,
    blocks,
    parts,
    slot,
    channel,
    C,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program serves a block of queries, and all their slots."""
    program = tl.program_id(0)
    block, problem = program % blocks, program // blocks
    image, head = problem // heads, problem % heads
    top, left, y, x, inside = locate_queries(block, parts, H, W, K, BLOCK_Q)
    pixel, start = y * W + x, channel + head * D
    pixels = tl.cast(image, tl.int64) * H * W + pixel
    q = load_tokens(
        query, None, head * D, offsets_of(image, y, x, query_b, query_y, query_x),
        inside, D, BLOCK_D,
    )  # fmt: skip
    g = load_tokens(grad, None, start, pixels * C, inside, D, BLOCK_D)
    o = load_tokens(out, None, start, pixels * C, inside, D, BLOCK_D)
    product = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    row = tl.cast(problem, tl.int64) * H * W + pixel
    tl.store(delta + row, product, mask=inside)
    shift = tl.load(lse + row, mask=inside, other=float("inf")) * LOG2E
    kernel += tl.cast(image, tl.int64) * kernel_b + tl.cast(head, tl.int64) * kernel_g + slot
    table += head * (2 * K - 1) * (2 * K - 1)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for first in range(0, K * K, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        valid = n < K * K
        key_y, key_x = top + n // K, left + n % K
        v = load_tokens(
            value, None, start, offsets_of(image, key_y, key_x, value_b, value_y, value_x),
            valid, D, BLOCK_D,
        )  # fmt: skip
        kernels = load_kernels(kernel, n, valid, kernel_d, D, BLOCK_D)
        added = load_added(table, bias + slot, n, valid, y, x, inside, key_y, key_x, K)
        logits = tl.dot(q, kernels, input_precision=PRECISION) * LOG2E + added
        weights = tl.exp2(logits - shift[:, None])
        ds = weights * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - product[:, None])
        ds, unit = fit_along(ds, 1, q.dtype)
        dq += tl.dot(ds, tl.trans(kernels), input_precision=PRECISION) * unit
    half = C // 2
    if added_grad is not None:
        dq += load_tokens(added_grad, None, head * D, pixels * half, inside, D, BLOCK_D)
    store_tokens(grad_query, head * D, pixels * half, inside, dq, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def mixing_class_slots_kernel(
    query,  # (B, H, W, C / 2)
    kernel,  # (B, G, D, S)
    value,  # (B, H, W, C)
    bias,  # (S,)
    table,  # (G, 2K - 1, 2K - 1)
    grad,  # (B, H, W, C)
    lse,  # (B, G, H, W)
    delta,  # (B, G, H, W)
    grad_kernel,  # (blocks, B, G, D, K * K), float32
    grad_logits,  # (groups, G, H * W, K * K), float32, summed over the images of a group
    query_b,
    query_y,
    query_x,
    kernel_b,
    kernel_g,
    kernel_d,
    value_b,
    value_y,
    value_x,
    H,
    W,
    heads,
    blocks,
    parts,
    slot,
    channel,
    C,
    batch,
    chunk,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program serves a tile of slots and a block of queries of a head, in a group of images."""
    TILES: tl.constexpr = (K * K + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    tile, block = program % TILES, program // TILES % blocks
    head, group = program // TILES // blocks % heads, program // TILES // blocks // heads
    top, left, y, x, inside = locate_queries(block, parts, H, W, K, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = n < K * K
    key_y, key_x = top + n // K, left + n % K
    pixel, start = y * W + x, channel + head * D
    table += head * (2 * K - 1) * (2 * K - 1)
    # the same for all images
    added = load_added(table, bias + slot, n, valid, y, x, inside, key_y, key_x, K)
    slots = (d < D)[:, None] & valid[None, :]
    total = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    for image in range(group * chunk, tl.minimum(group * chunk + chunk, batch)):
        long_image = tl.cast(image, tl.int64)
        problem, pixels = long_image * heads + head, long_image * H * W + pixel
        q = load_tokens(
            query, None, head * D, offsets_of(image, y, x, query_b, query_y, query_x),
            inside, D, BLOCK_D,
        )  # fmt: skip
        v = load_tokens(
            value, None, start, offsets_of(image, key_y, key_x, value_b, value_y, value_x),
            valid, D, BLOCK_D,
        )  # fmt: skip
        kernels = load_kernels(
            kernel + long_image * kernel_b + tl.cast(head, tl.int64) * kernel_g + slot,
            n, valid, kernel_d, D, BLOCK_D,
        )  # fmt: skip
        g = load_tokens(grad, None, start, pixels * C, inside, D, BLOCK_D)
        row = problem * H * W + pixel
        product = tl.load(delta + row, mask=inside, other=0.0)
        shift = tl.load(lse + row, mask=inside, other=float("inf")) * LOG2E
        logits = tl.dot(q, kernels, input_precision=PRECISION) * LOG2E + added
        weights = tl.exp2(logits - shift[:, None])
        ds = weights * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - product[:, None])
        total += ds
        # queries are zero in rows that are none
        ds, unit = fit_along(ds, 0, q.dtype)
        dk = tl.dot(tl.trans(q), ds, input_precision=PRECISION) * unit
        part = (tl.cast(block, tl.int64) * batch * heads + problem) * D * (K * K)
        tl.store(grad_kernel + part + (d * (K * K))[:, None] + n[None, :], dk, mask=slots)
    grad_logits += (tl.cast(group, tl.int64) * heads + head) * H * W * (K * K)
    mask = inside[:, None] & valid[None, :]
    tl.store(grad_logits + (pixel * (K * K))[:, None] + n[None, :], total, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def mixing_class_values_kernel(
    query,  # (B, H, W, C / 2)
    kernel,  # (B, G, D, S)
    bias,  # (S,)
    table,  # (G, 2K - 1, 2K - 1)
    grad,  # (B, H, W, C)
    lse,  # (B, G, H, W)
    grad_value,  # (B, H, W, C)
    query_b,
    query_y,
    query_x,
    kernel_b,
    kernel_g,
    kernel_d,
    H,
    W,
    heads,
    blocks,
    parts,
    slot,
    channel,
    C,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program serves a block of pixels as keys, of one head of one image, and all queries."""
    program = tl.program_id(0)
    tiles = (H * W + BLOCK_N - 1) // BLOCK_N
    tile, problem = program % tiles, program // tiles
    image, head = problem // heads, problem % heads
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    key_y, key_x = n // W, n % W
    kernel += tl.cast(image, tl.int64) * kernel_b + tl.cast(head, tl.int64) * kernel_g + slot
    table += head * (2 * K - 1) * (2 * K - 1)
    start = channel + head * D
    first_pixel = tl.cast(image, tl.int64) * H * W
    lse += tl.cast(problem, tl.int64) * H * W
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for block in range(0, blocks):
        top, left, y, x, inside = locate_queries(block, parts, H, W, K, BLOCK_Q)
        a, b = key_y - top, key_x - left
        valid = (a >= 0) & (a < K) & (b >= 0) & (b < K)
        slots = a * K + b
        q = load_tokens(
            query, None, head * D, offsets_of(image, y, x, query_b, query_y, query_x),
            inside, D, BLOCK_D,
        )  # fmt: skip
        pixel = y * W + x
        g = load_tokens(grad, None, start, (first_pixel + pixel) * C, inside, D, BLOCK_D)
        shift = tl.load(lse + pixel, mask=inside, other=float("inf")) * LOG2E
        kernels = load_kernels(kernel, slots, valid, kernel_d, D, BLOCK_D)
        added = load_added(table, bias + slot, slots, valid, y, x, inside, key_y, key_x, K)
        logits = tl.dot(q, kernels, input_precision=PRECISION) * LOG2E + added
        weights = tl.exp2(logits - shift[:, None])
        dv += tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision=PRECISION)
    store_tokens(grad_value, start, (first_pixel + n) * C, n < H * W, dv, D, BLOCK_D)
