"""Tokens of a map as tiles `(N, BLOCK_D)` of one head: what the kernels of all ops share."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate_tokens(batch, n, H, W, stride_b, stride_y, stride_x):
    """Offsets of tokens n of an image, row by row, their pixel numbers, which are in the map."""
    batch, y, x = tl.cast(batch, tl.int64), (n // W).to(tl.int64), (n % W).to(tl.int64)
    return batch * stride_b + y * stride_y + x * stride_x, batch * H * W + n, n < H * W


@triton.jit
def load_tokens(ptr, pad, start, offsets, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Channels start..start + D of tokens, `(N, BLOCK_D)`; `pad` for those outside the map."""
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if D != BLOCK_D:
        mask = mask & (d < D)[None, :]
    tokens = tl.load(ptr + start + offsets[:, None] + d[None, :], mask=mask, other=0.0)
    if pad is not None:
        vector = tl.load(pad + start + d, mask=d < D, other=0.0).to(tokens.dtype)
        tokens = tl.where(inside[:, None], tokens, vector[None, :])
    return tokens


@triton.jit
def store_tokens(ptr, start, offsets, inside, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the tokens that lie in the map."""
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if D != BLOCK_D:
        mask = mask & (d < D)[None, :]
    tokens = tokens.to(ptr.dtype.element_ty)
    tl.store(ptr + start + offsets[:, None] + d[None, :], tokens, mask=mask)


@triton.jit
def fit(tile, DTYPE: tl.constexpr):
    """A tile in the type of the products, over a unit where float16 might not hold it."""
    if DTYPE.is_fp16():
        largest = tl.max(tl.max(tl.abs(tile), 1), 0)
        unit = tl.where(largest > 0, largest, 1.0)
    else:
        unit = 1.0
    return (tile / unit).to(DTYPE), unit


@triton.jit
def fit_along(tile, AXIS: tl.constexpr, DTYPE: tl.constexpr):
    """`fit` with a unit for every row (AXIS 1) or column (AXIS 0).

    Triton 3.6 cannot reduce the large products of sm_100 to one number.
    """
    if DTYPE.is_fp16():
        largest = tl.max(tl.abs(tile), AXIS, keep_dims=True)
        unit = tl.where(largest > 0, largest, 1.0)
    else:
        unit = 1.0
    return (tile / unit).to(DTYPE), unit
