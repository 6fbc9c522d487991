"""Rank-augmented attention, backward: three passes over the tokens.

The first, over the queries, sums the gradients of S and c; the second finds those of keys and
values, and of the mean query; the third those of the queries. Programs and states are as forward.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._rank_augmented_kernels import SIZES, attend
from ._rank_augmented_tokens import (
    EPS,
    fit_rows,
    load_pairs,
    load_rotation,
    load_rows,
    load_vector,
    positive,
    store_pairs,
    store_rows,
    store_vector,
)
from ._token_reduction import locate_part, part_index
from ._tokens import LOG2E, fit, load_tokens, locate_tokens, store_tokens


@triton.jit(do_not_specialize=SIZES)
def rank_augmented_bwd_state_kernel(
    grad,  # (B, H, W, C)
    qkv,  # (B, H, W, 3C or 4C)
    rotary,  # (2, span, D / 4)
    addend,  # (B, H, W, C) or None
    state,  # (B * heads, D + 1, D)
    grad_states,  # (parts, B * heads, D + 1, D)
    grad_qkv,  # (B, H, W, 3C or 4C)
    grad_addend,  # (B, H, W, C) or None
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
    """Sums of the gradients of S and c over tokens; the gradients of the gate and the addend."""
    problem, batch, start, first, last = locate_part(heads, chunk, H, W, D)
    dtype: tl.constexpr = qkv.dtype.element_ty
    state += tl.cast(problem, tl.int64) * (D + 1) * D
    s_even, s_odd = load_rows(state, D, BLOCK_D)
    s_even, s_odd, unit = fit_rows(s_even, s_odd, dtype)
    c_even, c_odd = load_vector(state + D * D, D, BLOCK_D)
    even = tl.zeros((BLOCK_D // 2, BLOCK_D), tl.float32)
    odd = tl.zeros((BLOCK_D // 2, BLOCK_D), tl.float32)
    dc_even = tl.zeros((BLOCK_N, BLOCK_D // 2), tl.float32)
    dc_odd = tl.zeros((BLOCK_N, BLOCK_D // 2), tl.float32)
    for token in range(first, last, BLOCK_N):
        n = token + tl.arange(0, BLOCK_N)
        tokens, pixels, inside = locate_tokens(batch, n, H, W, stride_b, stride_y, stride_x)
        q_even, q_odd = load_pairs(qkv, start, tokens, inside, D, BLOCK_D)
        q_even, q_odd = positive(q_even, D, BLOCK_D), positive(q_odd, D, BLOCK_D)
        cos, sin = load_rotation(rotary, n, inside, W, span, D, BLOCK_D)
        if dtype.is_fp32():
            # read again, S needs no registers between two tiles
            s_even, s_odd = load_rows(state, D, BLOCK_D)
        core, turned_even, turned_odd, q_even, q_odd, den = attend(
            q_even, q_odd, cos, sin, s_even, s_odd, unit, c_even, c_odd, PRECISION
        )
        g = load_tokens(grad, None, start, pixels * C, inside, D, BLOCK_D).to(tl.float32)
        if GATED:
            total = core
            if addend is not None:
                added, _, _ = locate_tokens(batch, n, H, W, addend_b, addend_y, addend_x)
                total += load_tokens(addend, None, start, added, inside, D, BLOCK_D)
            store_tokens(grad_qkv, 3 * C + start, pixels * 4 * C, inside, g * total, D, BLOCK_D)
            g *= load_tokens(qkv, None, 3 * C + start, tokens, inside, D, BLOCK_D)
            if addend is not None:
                store_tokens(grad_addend, start, pixels * C, inside, g, D, BLOCK_D)
        dden = -tl.sum(core * g, 1) / den
        dc_even += dden[:, None] * q_even
        dc_odd += dden[:, None] * q_odd
        turned_even, turned_odd = turned_even / den[:, None], turned_odd / den[:, None]
        turned_even, turned_odd, turned_unit = fit_rows(turned_even, turned_odd, dtype)
        g, g_unit = fit(g, dtype)
        factor = turned_unit * g_unit
        even += tl.dot(tl.trans(turned_even), g, input_precision=PRECISION) * factor
        odd += tl.dot(tl.trans(turned_odd), g, input_precision=PRECISION) * factor
    index = part_index(problem)
    grad_state = grad_states + index * (D + 1) * D
    store_rows(grad_state, even, odd, D, BLOCK_D)
    store_vector(grad_state + D * D, tl.sum(dc_even, 0), tl.sum(dc_odd, 0), D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def rank_augmented_bwd_kv_kernel(
    qkv,  # (B, H, W, 3C or 4C)
    rotary,  # (2, span, D / 4)
    mean,  # (B * heads, D)
    lse,  # (B * heads,)
    state,  # (B * heads, D + 1, D)
    grad_state,  # (B * heads, D + 1, D)
    grad_means,  # (parts, B * heads, D)
    grad_qkv,  # (B, H, W, 3C or 4C)
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
    GATED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of keys and values, and sums of those of the mean query."""
    problem, batch, start, first, last = locate_part(heads, chunk, H, W, D)
    offset = tl.cast(problem, tl.int64) * (D + 1) * D
    mean_even, mean_odd = load_vector(mean + tl.cast(problem, tl.int64) * D, D, BLOCK_D)
    top = tl.load(lse + problem)
    s_even, s_odd = load_rows(state + offset, D, BLOCK_D)
    ds_even, ds_odd = load_rows(grad_state + offset, D, BLOCK_D)
    constant = tl.sum(tl.sum(s_even * ds_even + s_odd * ds_odd, 1), 0)
    c_even, c_odd = load_vector(state + offset + D * D, D, BLOCK_D)
    dc_even, dc_odd = load_vector(grad_state + offset + D * D, D, BLOCK_D)
    constant += tl.sum(c_even * dc_even + c_odd * dc_odd, 0)
    ds_even, ds_odd, unit = fit_rows(ds_even, ds_odd, qkv.dtype.element_ty)
    sum_even = tl.zeros((BLOCK_N, BLOCK_D // 2), tl.float32)
    sum_odd = tl.zeros((BLOCK_N, BLOCK_D // 2), tl.float32)
    for token in range(first, last, BLOCK_N):
        n = token + tl.arange(0, BLOCK_N)
        tokens, pixels, inside = locate_tokens(batch, n, H, W, stride_b, stride_y, stride_x)
        pixels *= (3 + GATED) * C
        k_even, k_odd = load_pairs(qkv, C + start, tokens, inside, D, BLOCK_D)
        k_even, k_odd = positive(k_even, D, BLOCK_D), positive(k_odd, D, BLOCK_D)
        scores = tl.sum(k_even * mean_even[None, :] + k_odd * mean_odd[None, :], 1)
        weights = tl.where(inside, tl.exp2((scores * scale - top) * LOG2E), 0.0)
        cos, sin = load_rotation(rotary, n, inside, W, span, D, BLOCK_D)
        turned_even = (k_even * cos - k_odd * sin).to(ds_even.dtype)
        turned_odd = (k_odd * cos + k_even * sin).to(ds_even.dtype)
        dv = tl.dot(turned_even, ds_even, input_precision=PRECISION)
        dv += tl.dot(turned_odd, ds_odd, input_precision=PRECISION)
        dv *= (weights * unit)[:, None]
        store_tokens(grad_qkv, 2 * C + start, pixels, inside, dv, D, BLOCK_D)
        v = load_tokens(qkv, None, 2 * C + start, tokens, inside, D, BLOCK_D)
        u_even = tl.dot(v, tl.trans(ds_even), input_precision=PRECISION) * unit
        u_odd = tl.dot(v, tl.trans(ds_odd), input_precision=PRECISION) * unit
        t_even = u_even * cos + u_odd * sin + dc_even[None, :]
        t_odd = u_odd * cos - u_even * sin + dc_odd[None, :]
        da = tl.sum(k_even * t_even + k_odd * t_odd, 1)
        ds = weights * (da - constant) * scale
        sum_even += ds[:, None] * k_even
        sum_odd += ds[:, None] * k_odd
        dk_even = weights[:, None] * t_even + ds[:, None] * mean_even[None, :]
        dk_odd = weights[:, None] * t_odd + ds[:, None] * mean_odd[None, :]
        dk_even, dk_odd = dk_even * tl.minimum(k_even, 1.0), dk_odd * tl.minimum(k_odd, 1.0)
        store_pairs(grad_qkv, C + start, pixels, inside, dk_even, dk_odd, D, BLOCK_D)
    index = part_index(problem)
    count = (H * W).to(tl.float32)
    sum_even, sum_odd = tl.sum(sum_even, 0) / count, tl.sum(sum_odd, 0) / count
    store_vector(grad_means + index * D, sum_even, sum_odd, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def rank_augmented_bwd_q_kernel(
    grad,  # (B, H, W, C)
    qkv,  # (B, H, W, 3C or 4C)
    rotary,  # (2, span, D / 4)
    state,  # (B * heads, D + 1, D)
    grad_mean,  # (B * heads, D), of the mean query over the number of tokens
    grad_qkv,  # (B, H, W, 3C or 4C)
    stride_b,
    stride_y,
    stride_x,
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
    """Gradients of the queries."""
    problem, batch, start, first, last = locate_part(heads, chunk, H, W, D)
    dtype: tl.constexpr = qkv.dtype.element_ty
    state += tl.cast(problem, tl.int64) * (D + 1) * D
    s_even, s_odd = load_rows(state, D, BLOCK_D)
    s_even, s_odd, unit = fit_rows(s_even, s_odd, dtype)
    c_even, c_odd = load_vector(state + D * D, D, BLOCK_D)
    mean_even, mean_odd = load_vector(grad_mean + tl.cast(problem, tl.int64) * D, D, BLOCK_D)
    for token in range(first, last, BLOCK_N):
        n = token + tl.arange(0, BLOCK_N)
        tokens, pixels, inside = locate_tokens(batch, n, H, W, stride_b, stride_y, stride_x)
        # the products come first: what is loaded ahead of them takes registers
        g = load_tokens(grad, None, start, pixels * C, inside, D, BLOCK_D)
        if GATED:
            gate = load_tokens(qkv, None, 3 * C + start, tokens, inside, D, BLOCK_D)
            g, g_unit = fit(g.to(tl.float32) * gate, dtype)
            factor = unit * g_unit
        else:
            factor = unit
        if dtype.is_fp32():
            # read again, S needs no registers between two tiles
            s_even, s_odd = load_rows(state, D, BLOCK_D)
        w_even = tl.dot(g, tl.trans(s_even), input_precision=PRECISION)
        w_odd = tl.dot(g, tl.trans(s_odd), input_precision=PRECISION)
        q_even, q_odd = load_pairs(qkv, start, tokens, inside, D, BLOCK_D)
        q_even, q_odd = positive(q_even, D, BLOCK_D), positive(q_odd, D, BLOCK_D)
        den = tl.sum(q_even * c_even[None, :] + q_odd * c_odd[None, :], 1) + EPS
        factors = (factor / den)[:, None]
        w_even, w_odd = w_even * factors, w_odd * factors
        cos, sin = load_rotation(rotary, n, inside, W, span, D, BLOCK_D)
        u_even = w_even * cos + w_odd * sin
        u_odd = w_odd * cos - w_even * sin
        dden = -tl.sum(q_even * u_even + q_odd * u_odd, 1) / den
        dq_even = u_even + dden[:, None] * c_even[None, :] + mean_even[None, :]
        dq_odd = u_odd + dden[:, None] * c_odd[None, :] + mean_odd[None, :]
        dq_even, dq_odd = dq_even * tl.minimum(q_even, 1.0), dq_odd * tl.minimum(q_odd, 1.0)
        offsets = pixels * (3 + GATED) * C
        store_pairs(grad_qkv, start, offsets, inside, dq_even, dq_odd, D, BLOCK_D)
