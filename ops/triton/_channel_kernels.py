"""Channel attention: sums over the tokens, and what is done with them to every token.

A program serves one head of one image, and of a split the tokens of one part. Tiles of tokens are
`(BLOCK_N, BLOCK_D)`, of scores and weights `(BLOCK_D, BLOCK_D)`.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._token_reduction import (
    load_square,
    locate_part,
    part_index,
    store_square,
    sum_outer,
)
from ._tokens import LOG2E, load_tokens, locate_tokens, store_tokens

# one compilation serves all of these
SIZES = ["H", "W", "heads", "chunk"]


@triton.jit(do_not_specialize=SIZES)
def channel_sum_kernel(
    x,  # (B, H, W, at least C)
    y,  # (B, H, W, at least C)
    sums,  # (parts, B * heads, D, D)
    x_b,
    x_y,
    x_x,
    y_b,
    y_y,
    y_x,
    H,
    W,
    heads,
    chunk,
    x_part,
    y_part,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    problem, batch, start, first, last = locate_part(heads, chunk, H, W, D)
    total, _ = sum_outer(
        x, x_part + start, x_b, x_y, x_x, y, y_part + start, y_b, y_y, y_x,
        batch, first, last, H, W, D, BLOCK_N, BLOCK_D, PRECISION,
    )  # fmt: skip
    store_square(sums + part_index(problem) * D * D, total, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def channel_fwd_kernel(
    qkv,  # (B, H, W, 3C)
    sums,  # (B * heads, D, D), a^T b; None in the form of one program
    weights,  # (B, heads, D, D) or None
    out,  # (B, H, W, C)
    stride_b,
    stride_y,
    stride_x,
    H,
    W,
    heads,
    chunk,
    scale,
    C,
    rows_part,
    cols_part,
    mixed_part,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    problem, batch, start, first, last = locate_part(heads, chunk, H, W, D)
    if sums is None:
        scores, _ = sum_outer(
            qkv, rows_part + start, stride_b, stride_y, stride_x,
            qkv, cols_part + start, stride_b, stride_y, stride_x,
            batch, 0, H * W, H, W, D, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
    else:
        scores = load_square(sums + tl.cast(problem, tl.int64) * D * D, D, BLOCK_D)
    scores *= scale * LOG2E
    if D != BLOCK_D:
        scores = tl.where((tl.arange(0, BLOCK_D) < D)[None, :], scores, float("-inf"))
    attention = tl.exp2(scores - tl.max(scores, 1)[:, None])
    attention /= tl.sum(attention, 1)[:, None]
    if weights is not None:  # noqa: SIM102  one is known when compiling, the other is not
        if first == 0:
            store_square(weights + tl.cast(problem, tl.int64) * D * D, attention, D, BLOCK_D)
    mixing = tl.trans(attention.to(qkv.dtype.element_ty))
    for n in range(first, last, BLOCK_N):
        tokens, pixels, inside = locate_tokens(
            batch, n + tl.arange(0, BLOCK_N), H, W, stride_b, stride_y, stride_x
        )
        mixed = load_tokens(qkv, None, mixed_part + start, tokens, inside, D, BLOCK_D)
        values = tl.dot(mixed, mixing, input_precision=PRECISION)
        store_tokens(out, start, pixels * C, inside, values, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def channel_bwd_kernel(
    grad,  # (B, H, W, C)
    qkv,  # (B, H, W, 3C)
    sums,  # (B * heads, D, D), g^T m; None in the form of one program
    weights,  # (B, heads, D, D)
    grad_qkv,  # (B, H, W, 3C)
    stride_b,
    stride_y,
    stride_x,
    H,
    W,
    heads,
    chunk,
    scale,
    C,
    rows_part,
    cols_part,
    mixed_part,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    problem, batch, start, first, last = locate_part(heads, chunk, H, W, D)
    image = tl.cast(H * W, tl.int64) * C
    if sums is None:
        da, _ = sum_outer(
            grad, start, image, W * C, C,
            qkv, mixed_part + start, stride_b, stride_y, stride_x,
            batch, 0, H * W, H, W, D, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
    else:
        da = load_square(sums + tl.cast(problem, tl.int64) * D * D, D, BLOCK_D)
    attention = load_square(weights + tl.cast(problem, tl.int64) * D * D, D, BLOCK_D)
    ds = attention * (da - tl.sum(attention * da, 1)[:, None]) * scale
    # sums over many tokens may leave the range of float16
    unit = tl.max(tl.max(tl.abs(ds), 1), 0)
    unit = tl.where(unit > 0, unit, 1.0)
    ds = (ds / unit).to(qkv.dtype.element_ty)
    attention = attention.to(qkv.dtype.element_ty)
    for n in range(first, last, BLOCK_N):
        tokens, pixels, inside = locate_tokens(
            batch, n + tl.arange(0, BLOCK_N), H, W, stride_b, stride_y, stride_x
        )
        g = load_tokens(grad, None, start, pixels * C, inside, D, BLOCK_D)
        grad_mixed = tl.dot(g, attention, input_precision=PRECISION)
        store_tokens(grad_qkv, mixed_part + start, pixels * 3 * C, inside, grad_mixed, D, BLOCK_D)
        a = load_tokens(qkv, None, rows_part + start, tokens, inside, D, BLOCK_D)
        grad_cols = tl.dot(a, ds, input_precision=PRECISION) * unit
        store_tokens(grad_qkv, cols_part + start, pixels * 3 * C, inside, grad_cols, D, BLOCK_D)
        b = load_tokens(qkv, None, cols_part + start, tokens, inside, D, BLOCK_D)
        grad_rows = tl.dot(b, tl.trans(ds), input_precision=PRECISION) * unit
        store_tokens(grad_qkv, rows_part + start, pixels * 3 * C, inside, grad_rows, D, BLOCK_D)
