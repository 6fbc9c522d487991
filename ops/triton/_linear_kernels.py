"""Linear attention: a state of every image and head, and what it does to every token.

A program serves one head of one image, and of a split the tokens of one part. A state is S
`(D, D)`, a row a channel of the keys, over z `(D,)`. Where images and heads fill the device, a
program sums its state (`SUM`) and applies it; where they do not, states of parts are summed first.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._token_reduction import (
    load_square,
    locate_part,
    part_index,
    relu,
    store_square,
    sum_outer,
)
from ._tokens import fit, load_tokens, locate_tokens, store_tokens

# one compilation serves all of these
SIZES = ["H", "W", "heads", "chunk"]


@triton.jit
def load_state(ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A matrix over a vector, zero beyond."""
    d = tl.arange(0, BLOCK_D)
    return load_square(ptr, D, BLOCK_D), tl.load(ptr + D * D + d, mask=d < D, other=0.0)


@triton.jit
def store_state(ptr, matrix, vector, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write a matrix over a vector."""
    d = tl.arange(0, BLOCK_D)
    store_square(ptr, matrix, D, BLOCK_D)
    tl.store(ptr + D * D + d, vector, mask=d < D)


@triton.jit
def fit_twice(tile, DTYPE: tl.constexpr):
    """`fit`, and what it rounds off in the same type and unit."""
    high, unit = fit(tile, DTYPE)
    return high, (tile / unit - high.to(tl.float32)).to(DTYPE), unit


@triton.jit
def denominators(queries, vector, least):
    """Denominators of queries after relu, and what they would be without a bound."""
    raw = tl.sum(queries * vector[None, :], 1)
    return tl.where(raw < least, least, raw), raw


@triton.jit(do_not_specialize=SIZES)
def linear_sum_kernel(
    qkv,  # (B, H, W, 3C)
    states,  # (parts, B * heads, D + 1, D)
    stride_b,
    stride_y,
    stride_x,
    H,
    W,
    heads,
    chunk,
    C,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """States of the parts of the tokens."""
    problem, batch, start, first, last = locate_part(heads, chunk, H, W, D)
    matrix, vector = sum_outer(
        qkv, C + start, stride_b, stride_y, stride_x,
        qkv, 2 * C + start, stride_b, stride_y, stride_x,
        batch, first, last, H, W, D, BLOCK_N, BLOCK_D, PRECISION, True,
    )  # fmt: skip
    store_state(states + part_index(problem) * (D + 1) * D, matrix, vector, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def linear_fwd_kernel(
    qkv,  # (B, H, W, 3C)
    temperature,  # (heads,)
    state,  # (B * heads, D + 1, D), written if the program sums it; None if nobody wants it
    out,  # (B, H, W, C)
    stride_b,
    stride_y,
    stride_x,
    H,
    W,
    heads,
    chunk,
    C,
    least,
    SUM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    problem, batch, start, first, last = locate_part(heads, chunk, H, W, D)
    offset = tl.cast(problem, tl.int64) * (D + 1) * D
    if SUM:
        matrix, vector = sum_outer(
            qkv, C + start, stride_b, stride_y, stride_x,
            qkv, 2 * C + start, stride_b, stride_y, stride_x,
            batch, first, last, H, W, D, BLOCK_N, BLOCK_D, PRECISION, True,
        )  # fmt: skip
        if state is not None:
            store_state(state + offset, matrix, vector, D, BLOCK_D)
    else:
        matrix, vector = load_state(state + offset, D, BLOCK_D)
    matrix, unit = fit(matrix, qkv.dtype.element_ty)
    factor = tl.load(temperature + problem % heads).to(tl.float32) * unit
    for n in range(first, last, BLOCK_N):
        tokens, pixels, inside = locate_tokens(
            batch, n + tl.arange(0, BLOCK_N), H, W, stride_b, stride_y, stride_x
        )
        q = relu(load_tokens(qkv, None, start, tokens, inside, D, BLOCK_D))
        den, _ = denominators(q, vector, least)
        values = tl.dot(q, matrix, input_precision=PRECISION) * (factor / den)[:, None]
        store_tokens(out, start, pixels * C, inside, values, D, BLOCK_D)


@triton.jit
def pass_queries(
    grad, qkv, temperature, state, grad_qkv, stride_b, stride_y, stride_x,
    problem, batch, start, first, last, H, W, heads, C, least,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write gradients of queries; return those of S, over the temperature, and of z."""
    dtype: tl.constexpr = qkv.dtype.element_ty
    matrix, vector = load_state(state + tl.cast(problem, tl.int64) * (D + 1) * D, D, BLOCK_D)
    matrix, rest, unit = fit_twice(matrix, dtype)
    factor = tl.load(temperature + problem % heads).to(tl.float32) * unit
    total = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for n in range(first, last, BLOCK_N):
        tokens, pixels, inside = locate_tokens(
            batch, n + tl.arange(0, BLOCK_N), H, W, stride_b, stride_y, stride_x
        )
        q = relu(load_tokens(qkv, None, start, tokens, inside, D, BLOCK_D))
        g = load_tokens(grad, None, start, pixels * C, inside, D, BLOCK_D)
        den, raw = denominators(q, vector, least)
        u = tl.dot(g, tl.trans(matrix), input_precision=PRECISION)
        if not dtype.is_fp32():
            # most of u cancels where values have a mean: it needs all digits
            u += tl.dot(g, tl.trans(rest), input_precision=PRECISION)
        u *= (factor / den)[:, None]
        dden = tl.where(raw >= least, -tl.sum(q * u, 1) / den, 0.0)
        sums += dden[:, None] * q
        dq = tl.where(q <= 0, 0.0, u + dden[:, None] * vector[None, :])
        store_tokens(grad_qkv, start, pixels * 3 * C, inside, dq, D, BLOCK_D)
        # small where denominators are large
        g, g_unit = fit(g / den[:, None], dtype)
        total += tl.dot(tl.trans(q), g, input_precision=PRECISION) * g_unit
    return total, tl.sum(sums, 0)


@triton.jit(do_not_specialize=SIZES)
def linear_bwd_sum_kernel(
    grad,  # (B, H, W, C)
    qkv,  # (B, H, W, 3C)
    temperature,  # (heads,)
    state,  # (B * heads, D + 1, D)
    grad_states,  # (parts, B * heads, D + 1, D)
    grad_qkv,  # (B, H, W, 3C)
    stride_b,
    stride_y,
    stride_x,
    H,
    W,
    heads,
    chunk,
    C,
    least,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of queries, and those of the state as sums of the parts."""
    problem, batch, start, first, last = locate_part(heads, chunk, H, W, D)
    matrix, vector = pass_queries(
        grad, qkv, temperature, state, grad_qkv, stride_b, stride_y, stride_x,
        problem, batch, start, first, last, H, W, heads, C, least,
        D, BLOCK_N, BLOCK_D, PRECISION,
    )  # fmt: skip
    store_state(grad_states + part_index(problem) * (D + 1) * D, matrix, vector, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def linear_bwd_kernel(
    grad,  # (B, H, W, C)
    qkv,  # (B, H, W, 3C)
    temperature,  # (heads,)
    state,  # (B * heads, D + 1, D)
    grad_state,  # the same; None if the program sums it
    grad_temperature,  # (B * heads,)
    grad_qkv,  # (B, H, W, 3C)
    stride_b,
    stride_y,
    stride_x,
    H,
    W,
    heads,
    chunk,
    C,
    least,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of keys and values, and of a temperature."""
    problem, batch, start, first, last = locate_part(heads, chunk, H, W, D)
    offset = tl.cast(problem, tl.int64) * (D + 1) * D
    if grad_state is None:
        matrix, vector = pass_queries(
            grad, qkv, temperature, state, grad_qkv, stride_b, stride_y, stride_x,
            problem, batch, start, first, last, H, W, heads, C, least,
            D, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
    else:
        matrix, vector = load_state(grad_state + offset, D, BLOCK_D)
    if first == 0:
        product = load_square(state + offset, D, BLOCK_D) * matrix
        tl.store(grad_temperature + problem, tl.sum(tl.sum(product, 1), 0))
    matrix, unit = fit(matrix, qkv.dtype.element_ty)
    factor = tl.load(temperature + problem % heads).to(tl.float32) * unit
    for n in range(first, last, BLOCK_N):
        tokens, pixels, inside = locate_tokens(
            batch, n + tl.arange(0, BLOCK_N), H, W, stride_b, stride_y, stride_x
        )
        pixels *= 3 * C
        k = relu(load_tokens(qkv, None, C + start, tokens, inside, D, BLOCK_D))
        dv = tl.dot(k, matrix, input_precision=PRECISION) * factor
        store_tokens(grad_qkv, 2 * C + start, pixels, inside, dv, D, BLOCK_D)
        v = load_tokens(qkv, None, 2 * C + start, tokens, inside, D, BLOCK_D)
        dk = tl.dot(v, tl.trans(matrix), input_precision=PRECISION) * factor + vector[None, :]
        dk = tl.where(k <= 0, 0.0, dk)
        store_tokens(grad_qkv, C + start, pixels, inside, dk, D, BLOCK_D)
