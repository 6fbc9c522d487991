"""Rank-augmented attention, forward: the mean query, the state of every head, the output.

A program serves one head of one image, and of its tokens one part. The state of a head is S
`(D, D)` and, one row below, c `(D,)`.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._rank_augmented_tokens import (
    EPS,
    fit_rows,
    load_pairs,
    load_rotation,
    load_rows,
    load_vector,
    positive,
    store_rows,
    store_vector,
)
from ._token_reduction import locate_part, part_index
from ._tokens import LN2, LOG2E, load_tokens, locate_tokens, store_tokens

# one compilation serves all of these
SIZES = ["H", "W", "heads", "chunk", "span"]


@triton.jit(do_not_specialize=SIZES)
def rank_augmented_mean_kernel(
    qkv,  # (B, H, W, 3C or 4C)
    means,  # (parts, B * heads, D), sums of phi(q) over the number of all tokens
    stride_b,
    stride_y,
    stride_x,
    H,
    W,
    heads,
    chunk,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    problem, batch, start, first, last = locate_part(heads, chunk, H, W, D)
    even = tl.zeros((BLOCK_N, BLOCK_D // 2), tl.float32)
    odd = tl.zeros((BLOCK_N, BLOCK_D // 2), tl.float32)
    for token in range(first, last, BLOCK_N):
        n = token + tl.arange(0, BLOCK_N)
        tokens, _, inside = locate_tokens(batch, n, H, W, stride_b, stride_y, stride_x)
        q_even, q_odd = load_pairs(qkv, start, tokens, inside, D, BLOCK_D)
        even += tl.where(inside[:, None], positive(q_even, D, BLOCK_D), 0.0)
        odd += tl.where(inside[:, None], positive(q_odd, D, BLOCK_D), 0.0)
    index = part_index(problem)
    count = (H * W).to(tl.float32)
    store_vector(means + index * D, tl.sum(even, 0) / count, tl.sum(odd, 0) / count, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def rank_augmented_state_kernel(
    qkv,  # (B, H, W, 3C or 4C)
    rotary,  # (2, span, D / 4)
    mean,  # (B * heads, D)
    states,  # (parts, B * heads, D + 1, D), each with a softmax over its own tokens
    lses,  # (parts, B * heads)
    stride_b,
    stride_y,
    stride_x,
    H,
    W,
    heads,
    chunk,
    span,
    scale,
    C,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    problem, batch, start, first, last = locate_part(heads, chunk, H, W, D)
    mean_even, mean_odd = load_vector(mean + tl.cast(problem, tl.int64) * D, D, BLOCK_D)
    mean_even, mean_odd = mean_even * (scale * LOG2E), mean_odd * (scale * LOG2E)
    even = tl.zeros((BLOCK_D // 2, BLOCK_D), tl.float32)
    odd = tl.zeros((BLOCK_D // 2, BLOCK_D), tl.float32)
    c_even = tl.zeros((BLOCK_N, BLOCK_D // 2), tl.float32)
    c_odd = tl.zeros((BLOCK_N, BLOCK_D // 2), tl.float32)
    totals = tl.zeros((BLOCK_N,), tl.float32)
    top = tl.full((), float("-inf"), tl.float32)
    for token in range(first, last, BLOCK_N):
        n = token + tl.arange(0, BLOCK_N)
        tokens, _, inside = locate_tokens(batch, n, H, W, stride_b, stride_y, stride_x)
        k_even, k_odd = load_pairs(qkv, C + start, tokens, inside, D, BLOCK_D)
        k_even, k_odd = positive(k_even, D, BLOCK_D), positive(k_odd, D, BLOCK_D)
        scores = tl.sum(k_even * mean_even[None, :] + k_odd * mean_odd[None, :], 1)
        scores = tl.where(inside, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 0))
        decay, weights = tl.exp2(top - new_top), tl.exp2(scores - new_top)
        top = new_top
        totals = totals * decay + weights
        k_even, k_odd = k_even * weights[:, None], k_odd * weights[:, None]
        c_even, c_odd = c_even * decay + k_even, c_odd * decay + k_odd
        cos, sin = load_rotation(rotary, n, inside, W, span, D, BLOCK_D)
        v = load_tokens(qkv, None, 2 * C + start, tokens, inside, D, BLOCK_D)
        turned_even = tl.trans((k_even * cos - k_odd * sin).to(v.dtype))
        turned_odd = tl.trans((k_odd * cos + k_even * sin).to(v.dtype))
        even = even * decay + tl.dot(turned_even, v, input_precision=PRECISION)
        odd = odd * decay + tl.dot(turned_odd, v, input_precision=PRECISION)
    index = part_index(problem)
    state = states + index * (D + 1) * D
    total = tl.sum(totals, 0)
    store_rows(state, even / total, odd / total, D, BLOCK_D)
    store_vector(state + D * D, tl.sum(c_even, 0) / total, tl.sum(c_odd, 0) / total, D, BLOCK_D)
    tl.store(lses + index, (top + tl.log2(total)) * LN2)


@triton.jit(do_not_specialize=["parts"])
def rank_augmented_merge_kernel(
    states,  # (parts, B * heads, D + 1, D)
    lses,  # (parts, B * heads)
    state,  # (B * heads, D + 1, D)
    lse,  # (B * heads,)
    parts,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row of a state: the mean of those of the parts, weighted by their softmax."""
    problem, row = tl.program_id(0), tl.program_id(1)
    problems, d = tl.num_programs(0), tl.arange(0, BLOCK_D)
    merged = tl.zeros((BLOCK_D,), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    top = tl.full((), float("-inf"), tl.float32)
    for first in range(0, parts, BLOCK_R):
        part = first + tl.arange(0, BLOCK_R)
        index = part.to(tl.int64) * problems + problem
        scores = tl.load(lses + index, mask=part < parts, other=float("-inf")) * LOG2E
        mask = (part < parts)[:, None] & (d < D)[None, :]
        offsets = (index * (D + 1) + row)[:, None] * D + d[None, :]
        rows = tl.load(states + offsets, mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(scores, 0))
        decay, weights = tl.exp2(top - new_top), tl.exp2(scores - new_top)
        top = new_top
        total = total * decay + tl.sum(weights, 0)
        merged = merged * decay + tl.sum(rows * weights[:, None], 0)
    offset = (tl.cast(problem, tl.int64) * (D + 1) + row) * D
    tl.store(state + offset + d, merged / total, mask=d < D)
    if row == 0:
        tl.store(lse + problem, (top + tl.log2(total)) * LN2)


@triton.jit
def attend(
    q_even, q_odd, cos, sin, s_even, s_odd, unit, c_even, c_odd,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries read from a state.

    Queries are counted in their own largest channel, which leaves the quotient as it is: cold ones
    would vanish in float16.

    Args:
        q_even: phi of the queries, and q_odd; zero beyond the last pair.
        cos: Rotation of the tokens, and sin.
        s_even: Rows of S / unit in the type of the products, and s_odd.
        unit: What S was divided by.
        c_even: Channels of c, and c_odd.

    Returns:
        The core `(BLOCK_N, BLOCK_D)`; turned queries over the denominator, even and odd; queries
        over the denominator, even and odd.
    """
    largest = tl.maximum(tl.max(tl.maximum(q_even, q_odd), 1), 1e-30)
    q_even, q_odd = q_even / largest[:, None], q_odd / largest[:, None]
    den = tl.sum(q_even * c_even[None, :] + q_odd * c_odd[None, :], 1) + EPS / largest
    turned_even = q_even * cos - q_odd * sin
    turned_odd = q_odd * cos + q_even * sin
    core = tl.dot(turned_even.to(s_even.dtype), s_even, input_precision=PRECISION)
    core += tl.dot(turned_odd.to(s_even.dtype), s_odd, input_precision=PRECISION)
    core *= (unit / den)[:, None]
    return core, turned_even, turned_odd, q_even, q_odd, den


@triton.jit(do_not_specialize=SIZES)
def rank_augmented_fwd_kernel(
    qkv,  # (B, H, W, 3C or 4C)
    rotary,  # (2, span, D / 4)
    addend,  # (B, H, W, C) or None
    state,  # (B * heads, D + 1, D)
    out,  # (B, H, W, C)
    stride_b,
    stride_y,
    stride_x,
    addend_b,
    addend_y,
    addend_x,
    H,
    W,
    heads,
    chunk,
    span,
    C,
    GATED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    problem, batch, start, first, last = locate_part(heads, chunk, H, W, D)
    state += tl.cast(problem, tl.int64) * (D + 1) * D
    s_even, s_odd = load_rows(state, D, BLOCK_D)
    s_even, s_odd, unit = fit_rows(s_even, s_odd, qkv.dtype.element_ty)
    c_even, c_odd = load_vector(state + D * D, D, BLOCK_D)
    for token in range(first, last, BLOCK_N):
        n = token + tl.arange(0, BLOCK_N)
        tokens, pixels, inside = locate_tokens(batch, n, H, W, stride_b, stride_y, stride_x)
        q_even, q_odd = load_pairs(qkv, start, tokens, inside, D, BLOCK_D)
        q_even, q_odd = positive(q_even, D, BLOCK_D), positive(q_odd, D, BLOCK_D)
        cos, sin = load_rotation(rotary, n, inside, W, span, D, BLOCK_D)
        core, _, _, _, _, _ = attend(
            q_even, q_odd, cos, sin, s_even, s_odd, unit, c_even, c_odd, PRECISION
        )
        if addend is not None:
            added, _, _ = locate_tokens(batch, n, H, W, addend_b, addend_y, addend_x)
            core += load_tokens(addend, None, start, added, inside, D, BLOCK_D).to(tl.float32)
        if GATED:
            core *= load_tokens(qkv, None, 3 * C + start, tokens, inside, D, BLOCK_D)
        store_tokens(out, start, pixels * C, inside, core, D, BLOCK_D)
