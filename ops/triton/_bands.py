"""Windows that never leave the map, as banded matrices: what the kernels of their ops share.

Along an axis pixels of one residue of the dilation are neighbors of each other only; here they are
counted by their position among those. The windows of neighboring queries `(BLOCK_Q,)` of a row
cover neighboring keys `(BLOCK_K,)`: a matrix of queries and keys has `key - start(query)` as slot,
and the slots 0..K - 1 of every row are its band.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def count_positions(length, residue, dilation):
    """Positions of an axis that have a residue."""
    return (length - residue + dilation - 1) // dilation


@triton.jit
def window_start(position, count, K: tl.constexpr):
    """First position of the window of a position."""
    return tl.minimum(tl.maximum(position - K // 2, 0), count - K)


@triton.jit
def first_query(key, K: tl.constexpr):
    """First position whose window has a key; they do not skip any."""
    return tl.where(key < K, 0, key - K // 2)


@triton.jit
def last_query(key, count, K: tl.constexpr):
    """Last position whose window has a key."""
    return tl.where(key >= count - K, count - 1, key + K // 2)


@triton.jit
def locate_block(index, width, blocks, dilation, BLOCK: tl.constexpr):
    """Of a block of positions of a row: their residue, how many have it, the first of the block."""
    residue = index // blocks
    return residue, count_positions(width, residue, dilation), index % blocks * BLOCK


@triton.jit
def load_pixels(ptr, columns, stride_x, channels, inside, D: tl.constexpr):
    """Channels of pixels of a row, `(pixels, channels)`; zeros outside."""
    mask = inside[:, None] & (channels < D)[None, :]
    offsets = columns.to(tl.int64)[:, None] * stride_x + channels[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def store_pixels(ptr, columns, stride_x, channels, inside, values, D: tl.constexpr):
    """Write channels of pixels of a row."""
    mask = inside[:, None] & (channels < D)[None, :]
    offsets = columns.to(tl.int64)[:, None] * stride_x + channels[None, :]
    tl.store(ptr + offsets, values.to(ptr.dtype.element_ty), mask=mask)
