"""Dynamic mixing in PyTorch: rectangles of pixels whose windows lie in one block of the map.

Pixels near a border share their window, pixels far from it have windows one apart. So a rectangle
of pixels of either kind attends to one block of pixels, and its weighted sums are one product: of
the values of the block with the weights, written into rows of zeros at the place of every window.
Weights of a rectangle are computed where they are needed and thrown away, backward too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

from ._common import accumulation_dtype
from ._windows import table_gradient

# weights held at once, before and after they are put among zeros: 1 MB in float32, to stay in cache
_BLOCK = 1 << 18
# rows and columns of a rectangle far from borders: wider ones have more zeros, narrower more calls
_ROWS, _COLUMNS = 4, 16


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Segment(NamedTuple):
    """Neighboring positions of an axis, and their windows.

    Attributes:
        first: First position.
        length: Positions.
        start: Where the first window starts.
        step: From the start of one window to the next: 1, or 0 if they share one.
    """

    first: int
    length: int
    start: int
    step: int

    @property
    def positions(self) -> slice:
        """The positions."""
        return slice(self.first, self.first + self.length)

    @property
    def own(self) -> slice:
        """The slots of the positions in their own windows, one if it is the same for all."""
        first = self.first - self.start
        return slice(first, first + (1 if self.step else self.length))

    def reach(self, size: int) -> slice:
        """What windows of a size cover."""
        return slice(self.start, self.start + self.step * (self.length - 1) + size)


def segments(length: int, size: int, most: int) -> list[Segment]:
    """Divide an axis into segments, far from borders of at most so many positions."""
    if length == size:
        return [Segment(0, length, 0, 0)]
    radius = size // 2
    edge, far = radius + 1, length - size - 1
    inner = [
        Segment(edge + done, min(most, far - done), 1 + done, 1) for done in range(0, far, most)
    ]
    return [Segment(0, edge, 0, 0), *inner, Segment(length - edge, edge, length - size, 0)]


def to_heads(x: Tensor, parts: int, heads: int) -> Tensor:
    """Maps `(parts, B, G, H, W, D)` of a map `(B, H, W, parts * G * D)`, in the type of sums."""
    split = x.unflatten(-1, (parts, heads, x.shape[-1] // (parts * heads)))
    return split.permute(3, 0, 4, 1, 2, 5).to(accumulation_dtype(x.dtype)).contiguous()


def from_heads(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `to_heads`, to a contiguous map of a type."""
    return x.permute(1, 3, 4, 0, 2, 5).flatten(3).to(dtype).contiguous()


def sizes(tables: tuple[Tensor, ...]) -> list[int]:
    """The sizes of windows that tables of relative positions are for."""
    return [(table.shape[-1] + 1) // 2 for table in tables]


def expand(table: Tensor, bias: Tensor) -> Tensor:
    """What a half adds to its logits `(G, K, K, K * K)`, by own slot and slot of a window."""
    size = (table.shape[-1] + 1) // 2
    # views of the table for own slots in falling order
    views = table.unfold(1, size, 1).unfold(2, size, 1)
    return views.flip(1, 2).flatten(3).add_(bias)


def fold(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Sum a gradient of logits into those of the table and the bias.

    Args:
        logits: `(G, H', W', K * K)`, for the pixels of a map, or for all own slots
            (`H' = W' = K`).

    Returns:
        The gradients `(G, 2K - 1, 2K - 1)` of the table and `(K * K,)` of the bias.
    """
    size = isqrt(logits.shape[-1])
    for dim in (1, 2):
        logits = _by_own_slot(logits, dim, size)
    pairs = logits.flatten(1, 2).transpose(-1, -2)
    return table_gradient(pairs, (size, size)).contiguous(), logits.sum((0, 1, 2))


def _by_own_slot(logits: Tensor, dim: int, size: int) -> Tensor:
    """Sum over positions of an axis that have the same slot in their own window."""
    if logits.shape[dim] == size:
        return logits
    radius = size // 2
    inner = logits.shape[dim] - 2 * radius
    first, middle, last = logits.split((radius, inner, radius), dim)
    return torch.cat([first, middle.sum(dim, keepdim=True), last], dim)


class Rectangle(NamedTuple):
    """Pixels of some images that attend to one block of the map."""

    images: slice
    rows: Segment
    cols: Segment
    size: int

    @property
    def at(self) -> tuple[slice, slice, slice, slice]:
        """Its pixels, as an index of `(B, G, H, W, ...)`."""
        return self.images, slice(None), self.rows.positions, self.cols.positions

    @property
    def reach(self) -> tuple[slice, slice, slice, slice]:
        """The pixels that it attends to."""
        return self.images, slice(None), self.rows.reach(self.size), self.cols.reach(self.size)

    @property
    def own(self) -> tuple[slice, slice, slice]:
        """Its own slots, as an index of `(G, K, K, ...)`."""
        return slice(None), self.rows.own, self.cols.own

    @property
    def shared(self) -> bool:
        """Whether its pixels have one window."""
        return self.rows.step == self.cols.step == 0

    @property
    def pixels(self) -> int:
        """Pixels in an image."""
        return self.rows.length * self.cols.length

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that it attends to."""
        rows, cols = (x.step * (x.length - 1) + self.size for x in (self.rows, self.cols))
        return rows, cols

    def windows(self, dense: Tensor) -> Tensor:
        """Of weights `(n, pixels, block)` those in the windows: a view `(n, h, w, K, K)`."""
        (height, width), (rows, cols) = self.block, (self.rows, self.cols)
        pixel = height * width
        strides = (
            self.pixels * pixel,
            cols.length * pixel + rows.step * width,
            pixel + cols.step,
            width,
            1,
        )
        shape = (len(dense), rows.length, cols.length, self.size, self.size)
        return dense.as_strided(shape, strides)

    def spread(self, weights: Tensor) -> Tensor:
        """Put weights `(n, pixels, K * K)` among zeros `(n, pixels, block)`."""
        if self.shared:
            return weights
        height, width = self.block
        dense = weights.new_zeros((*weights.shape[:2], height * width))
        view = self.windows(dense)
        view.copy_(weights.view(view.shape))
        return dense

    def gather(self, dense: Tensor) -> Tensor:
        """Undo `spread`."""
        if self.shared:
            return dense
        return self.windows(dense).reshape(*dense.shape[:2], self.size**2)


class Half:
    """One half of a call: queries `(B, G, H, W, D)`, kernels `(B, G, D, K * K)` and values."""

    def __init__(self, query: Tensor, kernel: Tensor, value: Tensor, added: Tensor) -> None:
        self.query, self.kernel, self.value, self.added = query, kernel, value, added
        self.size = added.shape[1]

    def rectangles(self) -> Iterator[Rectangle]:
        """Divide the call such that the weights of a rectangle stay in cache."""
        batch, heads, height, width, _ = self.query.shape
        rows, cols = segments(height, self.size, _ROWS), segments(width, self.size, _COLUMNS)
        for row, col in itertools.product(rows, cols):
            one = Rectangle(slice(0, 1), row, col, self.size)
            weights = one.pixels * (self.size**2 + one.block[0] * one.block[1])
            step = max(1, _BLOCK // (heads * weights))
            for first in range(0, batch, step):
                yield one._replace(images=slice(first, first + step))

    def load(self, rectangle: Rectangle) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(n, pixels, D)`, kernels `(n, D, K * K)` and values `(n, block, D)`."""
        query, value = self.query[rectangle.at], self.value[rectangle.reach]
        kernel = self.kernel[rectangle.images].flatten(0, 1)
        return query.flatten(0, 1).flatten(1, 2), kernel, value.flatten(0, 1).flatten(1, 2)

    def logits(self, rectangle: Rectangle, query: Tensor, kernel: Tensor) -> Tensor:
        """Logits `(n, pixels, K * K)`."""
        logits = query @ kernel
        added = self.added[rectangle.own]
        shape = (-1, len(added), rectangle.rows.length, rectangle.cols.length, added.shape[-1])
        logits.view(shape).add_(added)
        return logits


def _halves(
    query: Tensor, kernel: Tensor, value: Tensor, bias: Tensor, *tables: Tensor
) -> list[Half]:
    """The halves of a call."""
    heads, dtype = kernel.shape[1], accumulation_dtype(query.dtype)
    (queries,), values = to_heads(query, 1, heads), to_heads(value, 2, heads)
    slots = [size**2 for size in sizes(tables)]
    kernels = [part.contiguous() for part in kernel.to(dtype).split(slots, -1)]
    added = [
        expand(table, part)
        for table, part in zip(
            (t.to(dtype) for t in tables), bias.to(dtype).split(slots), strict=True
        )
    ]
    return [Half(queries, *parts) for parts in zip(kernels, values, added, strict=True)]


def forward(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the output `(B, H, W, C)` and the logsumexp of the logits `(2, B, G, H, W)`."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        halves = _halves(*inputs)
        out = halves[0].query.new_empty((2, *halves[0].query.shape))
        lse = out.new_empty(out.shape[:-1])
        for half, *parts in zip(halves, out, lse, strict=True):
            for rectangle in half.rectangles():
                _mix(half, rectangle, *parts)
        return from_heads(out, inputs[2].dtype), lse


def _mix(half: Half, rectangle: Rectangle, out: Tensor, lse: Tensor) -> None:
    query, kernel, value = half.load(rectangle)
    logits = half.logits(rectangle, query, kernel)
    # softmax by hand: its sums give the logsumexp, and divide what is narrower than the weights
    largest = logits.amax(dim=-1, keepdim=True)
    weights = logits.sub_(largest).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    target = lse[rectangle.at]
    target.copy_((largest + total.log()).view(target.shape))
    target = out[rectangle.at]
    target.copy_(((rectangle.spread(weights) @ value) / total).view(target.shape))


class _Gradients:
    """What the rectangles of one half give to the gradients."""

    def __init__(self, half: Half, query: Tensor) -> None:
        self.query, self.kernel = query, torch.zeros_like(half.kernel)
        self.value, self.logits = torch.zeros_like(half.value), torch.zeros_like(half.added)

    def add(self, half: Half, rectangle: Rectangle, grad: Tensor, delta: Tensor) -> None:
        """Add what one rectangle gives."""
        query, kernel, value = half.load(rectangle)
        g = grad[rectangle.at].flatten(0, 1).flatten(1, 2)
        weights = half.logits(rectangle, query, kernel).softmax(dim=-1)
        reach = self.value[rectangle.reach]
        reach += (rectangle.spread(weights).mT @ g).view(reach.shape)
        ds = rectangle.gather(g @ value.mT)
        ds -= delta[rectangle.at].reshape(*g.shape[:2], 1)
        ds *= weights
        target = self.query[rectangle.at]
        target += (ds @ kernel.mT).view(target.shape)
        target = self.kernel[rectangle.images]
        target += (query.mT @ ds).view(target.shape)
        self._add_logits(rectangle, ds)

    def _add_logits(self, rectangle: Rectangle, ds: Tensor) -> None:
        target, (rows, cols) = self.logits[rectangle.own], (rectangle.rows, rectangle.cols)
        total = ds.view(-1, len(target), rows.length, cols.length, ds.shape[-1]).sum(0)
        for dim, segment in ((1, rows), (2, cols)):
            if segment.step:
                total = total.sum(dim, keepdim=True)
        target += total


def backward(grad: Tensor, *saved: Tensor) -> Gradients:
    """Compute the gradients of the six inputs, of these, the output and the logsumexp."""
    *inputs, out, _ = saved
    with torch.autocast(grad.device.type, enabled=False):
        halves, heads = _halves(*inputs), inputs[1].shape[1]
        query = torch.zeros_like(halves[0].query)
        grads, outs = to_heads(grad, 2, heads), to_heads(out, 2, heads)
        results = []
        for half, g, o in zip(halves, grads, outs, strict=True):
            result, delta = _Gradients(half, query), (g * o).sum(-1)
            for rectangle in half.rectangles():
                result.add(half, rectangle, g, delta)
            results.append(result)
        query = from_heads(query[None], inputs[0].dtype)
        kernel = torch.cat([result.kernel for result in results], dim=-1)
        value = from_heads(torch.stack([result.value for result in results]), inputs[2].dtype)
        (small, bias), (large, rest) = (fold(result.logits) for result in results)
        bias = torch.cat([bias, rest]).to(inputs[3].dtype)
        small, large = small.to(inputs[4].dtype), large.to(inputs[5].dtype)
        return query, kernel.to(inputs[1].dtype), value, bias, small, large
