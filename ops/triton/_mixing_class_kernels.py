"""Dynamic mixing by classes of queries that share a window.

Such a class is plain attention to its window. Tiles of queries are `(BLOCK_Q, BLOCK_D)`, of
kernels `(BLOCK_D, BLOCK_N)`, of values `(BLOCK_N, BLOCK_D)` and of logits `(BLOCK_Q, BLOCK_N)`.
Classes are numbered row by row, as the windows that they share start; a large one has several
blocks of queries.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._tokens import LN2, LOG2E, load_tokens, store_tokens

# one compilation serves all of these
SIZES = ["H", "W", "heads", "batch", "parts", "blocks", "chunk", "slot"]


@triton.jit
def locate_queries(block, parts, H, W, K: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Where the window of a block of queries starts, their rows and columns, which of them are."""
    number = block // parts
    top, left = number // (W - K + 1), number % (W - K + 1)
    # the first and the last window of an axis are those of all positions near a border
    first_y = tl.where(top == 0, 0, top + K // 2)
    first_x = tl.where(left == 0, 0, left + K // 2)
    rows = tl.where(top == H - K, H, top + K // 2 + 1) - first_y
    cols = tl.where(left == W - K, W, left + K // 2 + 1) - first_x
    n = block % parts * BLOCK_Q + tl.arange(0, BLOCK_Q)
    return top, left, first_y + n // cols, first_x + n % cols, n < rows * cols


@triton.jit
def offsets_of(batch, y, x, stride_b, stride_y, stride_x):
    """Offsets of pixels of an image."""
    batch = tl.cast(batch, tl.int64)
    return batch * stride_b + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x


@triton.jit
def load_kernels(ptr, slots, valid, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Generated kernels of a head at some slots, `(BLOCK_D, BLOCK_N)`; zero where not `valid`."""
    d = tl.arange(0, BLOCK_D)
    mask = (d < D)[:, None] & valid[None, :]
    pointers = ptr + d.to(tl.int64)[:, None] * stride_d + slots[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_added(table, bias, slots, valid, y, x, inside, key_y, key_x, K: tl.constexpr):
    """What is added to logits of queries at (y, x) and keys, times log2 e.

    Args:
        table: Relative positions of the head, `(2K - 1, 2K - 1)`.
        bias: Bias of the slots of this half.
        slots: Slot of every key.
        valid: Which keys are in the window; the others are hidden.
        y: Rows of the queries, and x their columns.
        inside: Which queries there are.
        key_y: Rows of the keys, and key_x their columns.
        K: Size of the window.
    """
    offset_y = key_y[None, :] - y[:, None] + (K - 1)
    offset_x = key_x[None, :] - x[:, None] + (K - 1)
    mask = inside[:, None] & valid[None, :]
    added = tl.load(table + offset_y * (2 * K - 1) + offset_x, mask=mask, other=0.0)
    added += tl.load(bias + slots, mask=valid, other=0.0)[None, :]
    return tl.where(valid[None, :], added * LOG2E, float("-inf"))


@triton.jit(do_not_specialize=SIZES)
def mixing_class_fwd_kernel(
    query,  # (B, H, W, C / 2)
    kernel,  # (B, G, D, S)
    value,  # (B, H, W, C)
    bias,  # (S,)
    table,  # (G, 2K - 1, 2K - 1)
    out,  # (B, H, W, C)
    lse,  # (B, G, H, W)
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
    program = tl.program_id(0)
    block, problem = program % blocks, program // blocks
    image, head = problem // heads, problem % heads
    top, left, y, x, inside = locate_queries(block, parts, H, W, K, BLOCK_Q)
    q = load_tokens(
        query, None, head * D, offsets_of(image, y, x, query_b, query_y, query_x),
        inside, D, BLOCK_D,
    )  # fmt: skip
    kernel += tl.cast(image, tl.int64) * kernel_b + tl.cast(head, tl.int64) * kernel_g + slot
    table += head * (2 * K - 1) * (2 * K - 1)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    most = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    for first in range(0, K * K, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        valid = n < K * K
        key_y, key_x = top + n // K, left + n % K
        v = load_tokens(
            value, None, channel + head * D,
            offsets_of(image, key_y, key_x, value_b, value_y, value_x), valid, D, BLOCK_D,
        )  # fmt: skip
        kernels = load_kernels(kernel, n, valid, kernel_d, D, BLOCK_D)
        added = load_added(table, bias + slot, n, valid, y, x, inside, key_y, key_x, K)
        logits = tl.dot(q, kernels, input_precision=PRECISION) * LOG2E + added
        new_most = tl.maximum(most, tl.max(logits, 1))
        decay, weights = tl.exp2(most - new_most), tl.exp2(logits - new_most[:, None])
        most = new_most
        total = total * decay + tl.sum(weights, 1)
        acc *= decay[:, None]
        acc += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    pixel = y * W + x
    pixels = (tl.cast(image, tl.int64) * H * W + pixel) * C
    store_tokens(out, channel + head * D, pixels, inside, acc / total[:, None], D, BLOCK_D)
    lse += tl.cast(problem, tl.int64) * H * W
    tl.store(lse + pixel, (most + tl.log2(total)) * LN2, mask=inside)
