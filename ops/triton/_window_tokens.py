"""Window attention: what its kernels share, tokens of a window and their scores."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._tokens import LOG2E


@triton.jit
def locate(
    window, n, H, W, rows, cols, stride_b, stride_y, stride_x,
    P: tl.constexpr, Q: tl.constexpr, GRID: tl.constexpr,
):  # fmt: skip
    """Offsets of tokens n of a window, their pixel numbers, and which of them lie in the map."""
    cell = window % (rows * cols)
    batch = tl.cast(window // (rows * cols), tl.int64)
    if GRID:
        y = n // Q * rows + cell // cols
        x = n % Q * cols + cell % cols
    else:
        y = n // Q + cell // cols * P
        x = n % Q + cell % cols * Q
    inside = (n < P * Q) & (y < H) & (x < W)
    y, x = y.to(tl.int64), x.to(tl.int64)
    return batch * stride_b + y * stride_y + x * stride_x, (batch * H + y) * W + x, inside


@triton.jit
def load_bias(
    table, stride_y, stride_x, m, n,
    P: tl.constexpr, Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the table of a head adds to queries m and keys n, times log2 e; zero without a table."""
    bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if table is not None:
        y = m[:, None] // Q - n[None, :] // Q + (P - 1)
        x = m[:, None] % Q - n[None, :] % Q + (Q - 1)
        mask = (m < P * Q)[:, None] & (n < P * Q)[None, :]
        entries = tl.load(table + y * stride_y + x * stride_x, mask=mask, other=0.0)
        bias = entries.to(tl.float32) * LOG2E
    return bias


@triton.jit
def hide(
    tile, other, n, inside, pad, N: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """Put `other` where keys n are hidden: beyond the window, or outside the map without `pad`."""
    if RAGGED and pad is None:
        tile = tl.where(inside[None, :], tile, other)
    elif N % BLOCK_N != 0:
        tile = tl.where((n < N)[None, :], tile, other)
    return tile
