"""Tokens of rank-augmented attention in the kernels: pairs of channels, phi, rotation.

Channels `(2p, 2p + 1)` of a head turn together. A tile of tokens is read whole and divided into the
even and the odd channel of every pair, both `(BLOCK_N, BLOCK_D / 2)`; products over the channels
are the sum of two, one for each, so nothing is put together again before it is written.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._tokens import LOG2E, load_tokens, store_tokens

# added to the denominator
EPS = tl.constexpr(1e-6)


@triton.jit
def load_pairs(ptr, start, offsets, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Even and odd channels of tokens, in float32."""
    tile = load_tokens(ptr, None, start, offsets, inside, D, BLOCK_D).to(tl.float32)
    return tl.split(tl.reshape(tile, (tile.shape[0], BLOCK_D // 2, 2)))


@triton.jit
def store_pairs(ptr, start, offsets, inside, even, odd, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the tokens that lie in the map."""
    tile = tl.reshape(tl.join(even, odd), (even.shape[0], BLOCK_D))
    store_tokens(ptr, start, offsets, inside, tile, D, BLOCK_D)


@triton.jit
def load_vector(ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Even and odd channels of a vector `(D,)`, zero beyond."""
    channel = 2 * tl.arange(0, BLOCK_D // 2)
    inside = channel < D
    even = tl.load(ptr + channel, mask=inside, other=0.0)
    return even, tl.load(ptr + channel + 1, mask=inside, other=0.0)


@triton.jit
def store_vector(ptr, even, odd, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write a vector `(D,)`."""
    channel = 2 * tl.arange(0, BLOCK_D // 2)
    inside = channel < D
    tl.store(ptr + channel, even, mask=inside)
    tl.store(ptr + channel + 1, odd, mask=inside)


@triton.jit
def load_rows(ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Even and odd rows of a matrix `(D, D)`, zero beyond, each `(BLOCK_D / 2, BLOCK_D)`."""
    row, d = 2 * tl.arange(0, BLOCK_D // 2), tl.arange(0, BLOCK_D)
    inside = (row < D)[:, None] & (d < D)[None, :]
    offsets = row[:, None] * D + d[None, :]
    even = tl.load(ptr + offsets, mask=inside, other=0.0)
    return even, tl.load(ptr + D + offsets, mask=inside, other=0.0)


@triton.jit
def store_rows(ptr, even, odd, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write a matrix `(D, D)`."""
    row, d = 2 * tl.arange(0, BLOCK_D // 2), tl.arange(0, BLOCK_D)
    inside = (row < D)[:, None] & (d < D)[None, :]
    offsets = row[:, None] * D + d[None, :]
    tl.store(ptr + offsets, even, mask=inside)
    tl.store(ptr + D + offsets, odd, mask=inside)


@triton.jit
def positive(x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """phi(x) = elu(x) + 1 of one channel of every pair, zero beyond the last pair."""
    y = tl.where(x > 0, x + 1.0, tl.exp2(tl.minimum(x, 0.0) * LOG2E))
    if D != BLOCK_D:
        y = tl.where((tl.arange(0, BLOCK_D // 2) < D // 2)[None, :], y, 0.0)
    return y


@triton.jit
def load_rotation(rotary, n, inside, W, span, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Cosines and sines of the pairs of tokens n; zeros beyond the map and the last pair."""
    pair = tl.arange(0, BLOCK_D // 2)
    by_row = pair < D // 4
    position = tl.where(by_row[None, :], (n // W)[:, None], (n % W)[:, None])
    index = position * (D // 4) + tl.where(by_row, pair, pair - D // 4)[None, :]
    mask = inside[:, None]
    if D != BLOCK_D:
        mask = mask & (pair < D // 2)[None, :]
    cos = tl.load(rotary + index, mask=mask, other=0.0)
    return cos, tl.load(rotary + span * (D // 4) + index, mask=mask, other=0.0)


@triton.jit
def fit_rows(even, odd, DTYPE: tl.constexpr):
    """Even and odd rows in the type of the products, over one unit; see `fit`."""
    if DTYPE.is_fp16():
        largest = tl.max(tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), 1), 0)
        unit = tl.where(largest > 0, largest, 1.0)
    else:
        unit = 1.0
    return (even / unit).to(DTYPE), (odd / unit).to(DTYPE), unit
