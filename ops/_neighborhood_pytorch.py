"""Neighborhood attention in PyTorch, a tile of queries at a time: what runs on a CPU.

Queries of a tile meet all keys that any of them has, in one product, and a mask removes the pairs
that are no neighbors: more products than needed, but large ones, of what fits the cache. Pixels of
one residue of the dilation are neighbors of no others: they are a map of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._common import accumulation_dtype
from ._neighborhood import Pair, window_starts

# rows and columns of a tile of queries: more of them have more keys that are no neighbors
_TILE = (8, 8)
# scores held at once: 1 MB in float32, to stay in cache
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Window:
    """What the neighbors of a pixel are.

    Attributes:
        size: Rows and columns of a window.
        dilation: Distance of its rows and columns.
        clamp: Shift windows inside the map instead of letting them leave it.
        shifts: How far the map is rolled, for the heads in turn; none is (0, 0).
    """

    size: Pair
    dilation: Pair
    clamp: bool
    shifts: tuple[Pair, ...]


@dataclass(frozen=True)
class _Span:
    """Neighboring queries of an axis, the keys of their windows, and the start of each window."""

    queries: slice
    keys: slice
    starts: tuple[int, ...]

    @property
    def pattern(self) -> tuple[int, ...]:
        """What spans with the same neighbors have in common."""
        return (self.keys.stop - self.keys.start, *(s - self.keys.start for s in self.starts))


def _spans(length: int, size: int, clamp: bool, step: int) -> list[_Span]:
    if clamp:
        starts = window_starts(length, size).tolist()
    else:
        starts = list(range(-(size // 2), length - size // 2))
    spans = []
    for first in range(0, length, step):
        own = tuple(starts[first : first + step])
        keys = slice(max(0, own[0]), min(length, own[-1] + size))
        spans.append(_Span(slice(first, first + len(own)), keys, own))
    return spans


def _near(pattern: tuple[int, ...], size: int, like: Tensor) -> Tensor:
    """Which keys are in the window of which query, `(queries, keys)`."""
    keys, *starts = pattern
    offset = torch.arange(keys, device=like.device) - like.new_tensor(starts).long()[:, None]
    return (offset >= 0) & (offset < size)


@dataclass
class _Masks:
    """Masks of tiles, each made once.

    Attributes:
        size: Rows and columns of a window.
        like: A tensor of the type and device of the masks.
        made: Those that exist, by the patterns of their spans.
    """

    size: Pair
    like: Tensor
    made: dict[tuple[tuple[int, ...], ...], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, rows: _Span, cols: _Span) -> tuple[Tensor, Tensor]:
        """A mask `(queries, keys)` to add, and how many slots leave the map `(queries, 1)`."""
        key = (rows.pattern, cols.pattern)
        if key not in self.made:
            vertical = _near(key[0], self.size[0], self.like)[:, None, :, None]
            near = (vertical & _near(key[1], self.size[1], self.like)[:, None]).flatten(2)
            near = near.flatten(0, 1)
            mask = self.like.new_zeros(near.shape).masked_fill_(~near, -torch.inf)
            outside = self.size[0] * self.size[1] - near.sum(-1, keepdim=True)
            self.made[key] = mask, outside.to(self.like.dtype)
        return self.made[key]


@dataclass(frozen=True)
class _Tile:
    """Some images, a tile of their queries and the keys of it.

    Attributes:
        images: Which images.
        queries: Rows and columns of the queries.
        keys: Rows and columns of the keys.
        mask: What is added to the scores, `(queries, keys)`.
        outside: Slots that leave the map, `(queries, 1)`.
    """

    images: slice
    queries: tuple[slice, slice]
    keys: tuple[slice, slice]
    mask: Tensor
    outside: Tensor

    def take(self, grid: Tensor, keys: bool = False) -> Tensor:
        """Tokens `(images * heads, N, D)` of a grid `(B, H, W, heads, D)`, contiguous."""
        rows, cols = self.keys if keys else self.queries
        part = grid[self.images, rows, cols].permute(0, 3, 1, 2, 4).to(self.mask.dtype)
        return part.reshape(-1, self.mask.shape[keys], grid.shape[-1])

    def put(self, grid: Tensor, tokens: Tensor) -> None:
        """Write tokens of the queries to a grid."""
        self._part(grid, False).copy_(self._unfolded(grid, tokens, False))

    def add(self, grid: Tensor, tokens: Tensor, keys: bool = False) -> None:
        """Add tokens to a grid."""
        self._part(grid, keys).add_(self._unfolded(grid, tokens, keys))

    def _part(self, grid: Tensor, keys: bool) -> Tensor:
        rows, cols = self.keys if keys else self.queries
        return grid[self.images, rows, cols].permute(0, 3, 1, 2, 4)

    def _unfolded(self, grid: Tensor, tokens: Tensor, keys: bool) -> Tensor:
        return tokens.reshape(self._part(grid, keys).shape)


def _tiles(grid: Tensor, window: Window, dtype: torch.dtype) -> Iterator[_Tile]:
    """Tiles of undilated windows on a grid `(B, H, W, heads, D)`."""
    batch, height, width, heads, _ = grid.shape
    masks = _Masks(window.size, torch.empty(0, dtype=dtype, device=grid.device))
    columns = _spans(width, window.size[1], window.clamp, _TILE[1])
    for rows in _spans(height, window.size[0], window.clamp, _TILE[0]):
        for cols in columns:
            mask, outside = masks(rows, cols)
            step = max(1, _BLOCK // (heads * mask.numel()))
            for image in range(0, batch, step):
                images = slice(image, min(image + step, batch))
                yield _Tile(
                    images, (rows.queries, cols.queries), (rows.keys, cols.keys), mask, outside
                )


def _grids(window: Window, *maps: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of maps `(B, H, W, ...)`, for every residue of the dilation."""
    steps, (height, width) = window.dilation, maps[0].shape[1:3]
    for y in range(min(steps[0], height)):
        for x in range(min(steps[1], width)):
            yield tuple(m[:, y :: steps[0], x :: steps[1]] for m in maps)


def _rolled(x: Tensor, window: Window, back: bool = False) -> Tensor:
    """A map `(B, H, W, ..., heads, D)`, every head rolled; itself if there is nothing to do."""
    if all(shift == (0, 0) for shift in window.shifts):
        return x
    out, count, sign = torch.empty_like(x), len(window.shifts), 1 if back else -1
    for first, (rows, cols) in enumerate(window.shifts):
        heads = slice(first, None, count)
        out[..., heads, :] = x[..., heads, :].roll((sign * rows, sign * cols), (1, 2))
    return out


def _weights(tile: _Tile, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Unnormalized weights, their sum with the slots outside, and the logarithm of their unit."""
    scores = torch.baddbmm(tile.mask, q, k.mT, alpha=scale)
    # a slot outside has the score 0; where there is none its sum has no logarithm
    zeros = tile.outside.log()
    top = torch.maximum(scores.amax(-1, keepdim=True), zeros.clamp(max=0))
    weights = scores.sub_(top).exp_()
    return weights, weights.sum(-1, keepdim=True) + (zeros - top).exp(), top


def forward(qkv: Tensor, num_heads: int, window: Window, scale: float) -> tuple[Tensor, Tensor]:
    """Attend; the output, and the logsumexp of the scores `(B, heads, H, W)`."""
    (*size, packed), dtype = qkv.shape, accumulation_dtype(qkv.dtype)
    out = qkv.new_empty((*size, num_heads, packed // 3 // num_heads))
    lse = qkv.new_empty((*size, num_heads, 1), dtype=dtype)
    parts = _rolled(qkv.unflatten(-1, (3, num_heads, -1)), window).unbind(3)
    for q, k, v, o, m in _grids(window, *parts, out, lse):
        for tile in _tiles(q, window, dtype):
            weights, total, top = _weights(tile, tile.take(q), tile.take(k, True), scale)
            tile.put(o, weights @ tile.take(v, True) / total)
            tile.put(m, top + total.log())
    out, lse = (_rolled(x, window, back=True) for x in (out, lse))
    return out.flatten(-2), lse.squeeze(-1).permute(0, 3, 1, 2).contiguous()


def backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    window: Window,
    scale: float,
) -> Tensor:
    """Gradient of `qkv`; weights are computed again."""
    dtype = accumulation_dtype(qkv.dtype)
    g, o = (x.unflatten(-1, (num_heads, -1)) for x in (grad, out))
    delta = (g.to(dtype) * o.to(dtype)).sum(-1, keepdim=True)
    maps = (qkv.unflatten(-1, (3, num_heads, -1)), g, delta, lse.permute(0, 2, 3, 1).unsqueeze(-1))
    packed, *others = (_rolled(x, window) for x in maps)
    sums = torch.zeros(packed.shape, dtype=dtype, device=qkv.device)
    for grid in _grids(window, *packed.unbind(3), *others, *sums.unbind(3)):
        for tile in _tiles(grid[0], window, dtype):
            _add_gradients(tile, scale, *grid)
    return _rolled(sums.to(qkv.dtype), window, back=True).flatten(3)


def _add_gradients(tile: _Tile, scale: float, *grid: Tensor) -> None:
    """Add the gradients of a tile to the last three of a grid's maps."""
    q, g, delta, lse = (tile.take(grid[i]) for i in (0, 3, 4, 5))
    k, v = (tile.take(grid[i], keys=True) for i in (1, 2))
    weights = torch.baddbmm(tile.mask, q, k.mT, alpha=scale).sub_(lse).exp_()
    scores = torch.baddbmm(-delta, g, v.mT).mul_(weights).mul_(scale)
    tile.add(grid[6], scores @ k)
    tile.add(grid[7], scores.mT @ q, keys=True)
    tile.add(grid[8], weights.mT @ g, keys=True)
