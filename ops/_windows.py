"""Windows of a map as tensors: what the kernels do by index arithmetic, by copies."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Window = tuple[int, int]

# with more keys the backward pass is given the output and the logsumexp of the rows
ONE_TILE = 64


class Windows(NamedTuple):
    """How a call divides its map and its channels, in the order of the registered op."""

    num_heads: int
    height: int
    width: int
    grid: bool
    head_first: bool
    scale: float

    @property
    def size(self) -> Window:
        """Rows P and columns Q of a window."""
        return self.height, self.width

    @property
    def keys(self) -> int:
        """Tokens N of a window."""
        return self.height * self.width


def cells(height: int, width: int, window: Window) -> tuple[int, int]:
    """Rows and columns of windows `(P, Q)` that cover a map."""
    return (height + window[0] - 1) // window[0], (width + window[1] - 1) // window[1]


def partition(x: Tensor, window: Window, grid: bool) -> Tensor:
    """Cut a map `(B, H, W, C)`, filled up with zeros, into windows `(B, G, N, C)`."""
    (p, q), (batch, height, width, channels) = window, x.shape
    rows, cols = cells(height, width, window)
    if rows * p > height or cols * q > width:
        x = F.pad(x, (0, 0, 0, cols * q - width, 0, rows * p - height))
    if grid:
        x = x.reshape(batch, p, rows, q, cols, channels).permute(0, 2, 4, 1, 3, 5)
    else:
        x = x.reshape(batch, rows, p, cols, q, channels).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * cols, p * q, channels)


def merge(x: Tensor, window: Window, grid: bool, height: int, width: int) -> Tensor:
    """Put windows `(B, G, N, C)` together again: a map `(B, H, W, C)`, contiguous."""
    (p, q), (batch, _, _, channels) = window, x.shape
    rows, cols = cells(height, width, window)
    if grid:
        x = x.reshape(batch, rows, cols, p, q, channels).permute(0, 3, 1, 4, 2, 5)
    else:
        x = x.reshape(batch, rows, cols, p, q, channels).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(batch, rows * p, cols * q, channels)
    return x[:, :height, :width].contiguous()


def inside(x: Tensor, window: Window, grid: bool) -> Tensor | None:
    """Which tokens `(G, N)` of the windows lie in the map `(B, H, W, C)`; None if all do."""
    height, width = x.shape[1:3]
    rows, cols = cells(height, width, window)
    if rows * window[0] == height and cols * window[1] == width:
        return None
    ones = torch.ones(1, height, width, 1, dtype=torch.bool, device=x.device)
    return partition(ones, window, grid)[0, ..., 0]


def split_heads(tokens: Tensor, num_heads: int, head_first: bool) -> tuple[Tensor, ...]:
    """Split packed channels `(..., N, 3C)` into q, k and v `(..., heads, N, D)`."""
    if head_first:
        split = tokens.unflatten(-1, (num_heads, 3, -1)).movedim(-2, 0)
    else:
        split = tokens.unflatten(-1, (3, num_heads, -1)).movedim(-3, 0)
    return split.transpose(-3, -2).unbind(0)


def fill_windows(x: Tensor, window: Window, vector: Tensor | None) -> Tensor:
    """Continue a map `(B, H, W, C)` to the end of its windows, with a vector `(C,)` or zeros."""
    height, width = x.shape[1:3]
    rows, cols = cells(height, width, window)
    if rows * window[0] == height and cols * window[1] == width:
        return x
    x = F.pad(x, (0, 0, 0, cols * window[1] - width, 0, rows * window[0] - height))
    if vector is not None:
        x[:, height:] = vector
        x[:, :height, width:] = vector
    return x


def cut_heads(
    x: Tensor, parts: int, num_heads: int, window: Window, grid: bool, head_first: bool
) -> Tensor:
    """Cut a map `(B, H, W, parts * C)` that its windows fill into heads, with one copy at most.

    Returns:
        `(parts, B * G, heads, N, D)`, of which one product of matrices takes all as they are.
    """
    p, q = window
    packed = (num_heads, parts, -1) if head_first else (parts, num_heads, -1)
    x = x.unflatten(3, packed).unflatten(2, (q, -1) if grid else (-1, q))
    x = x.unflatten(1, (p, -1) if grid else (-1, p))
    x = x.permute(_cut_order(grid, head_first))
    count, dim = x.shape[1] * x.shape[2] * x.shape[3], x.shape[-1]
    return x.reshape(parts, count, num_heads, p * q, dim)


def join_heads(
    x: Tensor, size: tuple[int, int, int], window: Window, grid: bool, head_first: bool
) -> Tensor:
    """Undo `cut_heads` for a map of `size` `(B, H, W)`, with one copy."""
    (p, q), (batch, height, width), (parts, _, heads, _, dim) = window, size, x.shape
    x = x.reshape(parts, batch, height // p, width // q, heads, p, q, dim)
    order = _cut_order(grid, head_first)
    return x.permute([order.index(i) for i in range(8)]).reshape(*size, parts * heads * dim)


def _cut_order(grid: bool, head_first: bool) -> tuple[int, ...]:
    """From (batch, the map's rows and columns in two each, parts and heads, channels)."""
    parts, heads = (6, 5) if head_first else (5, 6)
    if grid:
        return parts, 0, 2, 4, heads, 1, 3, 7
    return parts, 0, 1, 3, heads, 2, 4, 7


def relative_bias(table: Tensor, window: Window) -> Tensor:
    """Expand a table `(heads, 2P - 1, 2Q - 1)` to the pairs of a window `(heads, N, N)`."""
    (p, q), device = window, table.device
    y, x = torch.arange(p, device=device), torch.arange(q, device=device)
    rows = (y[:, None] - y[None, :] + p - 1)[:, None, :, None]
    cols = (x[:, None] - x[None, :] + q - 1)[None, :, None, :]
    return table[:, rows, cols].reshape(-1, p * q, p * q)


def table_gradient(pairs: Tensor, window: Window) -> Tensor:
    """Sum over the pairs `(heads, N, N)` of every offset: `(heads, 2P - 1, 2Q - 1)`."""
    p, q = window
    by_column = _sum_offsets(pairs.reshape(-1, p, q, p, q).transpose(2, 3))
    return _sum_offsets(by_column.movedim(-1, 1)).transpose(1, 2)


def _sum_offsets(pairs: Tensor) -> Tensor:
    """Sum `(..., n, n)` over all i, j of one offset: `(..., 2n - 1)`, at `i - j + n - 1`."""
    n = pairs.shape[-1]
    # with j reversed, rows of 2n read as rows of 2n - 1 move row i by i to the right
    skewed = F.pad(pairs.flip(-1), (0, n)).flatten(-2)[..., :-n]
    return skewed.unflatten(-1, (n, 2 * n - 1)).sum(-2)
