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


def split_heads(tokens: Tensor, parts: int, num_heads: int, head_first: bool) -> tuple[Tensor, ...]:
    """Split packed channels `(..., N, parts * C)` into `parts` tensors `(..., heads, N, D)`."""
    if head_first:
        split = tokens.unflatten(-1, (num_heads, parts, -1)).movedim(-2, 0)
    else:
        split = tokens.unflatten(-1, (parts, num_heads, -1)).movedim(-3, 0)
    return split.transpose(-3, -2).unbind(0)


def pack_heads(parts: tuple[Tensor, ...], head_first: bool) -> Tensor:
    """Undo `split_heads`."""
    tokens = [part.transpose(-3, -2) for part in parts]
    return torch.stack(tokens, dim=-2 if head_first else -3).flatten(-3)


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
