"""Sums over all tokens of an image, for attention whose cost is linear in them.

Pass one reduces the tokens of an image and a head to a small state, pass two applies it to each.
Where images and heads are enough to fill the device, one program does both and the state stays in
its registers. Where they are not, several programs each sum a part of the tokens; the parts are
added in a fixed order, and as many programs apply the sum.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, multiprocessors, rows_contiguous
from ._tokens import load_tokens, locate_tokens

# images x heads, per multiprocessor, that need no split
_ENOUGH = 2
# programs per multiprocessor of a split, and the least tiles of each
_WAVES, _TILES = 4, 4


class Split(NamedTuple):
    """How the tokens of an image are shared out: programs, and tokens of each."""

    parts: int
    chunk: int


def split_tokens(like: Tensor, problems: int, tokens: int, block: int) -> Split:
    """Share out the tokens of every image and head.

    Args:
        like: A tensor on the device.
        problems: Images times heads.
        tokens: Tokens of an image.
        block: Tokens of a tile.
    """
    processors = multiprocessors(like)
    parts = min(cdiv(_WAVES * processors, max(1, problems)), cdiv(tokens, _TILES * block))
    if problems >= _ENOUGH * processors:
        parts = 1
    chunk = cdiv(cdiv(tokens, parts), block) * block
    return Split(cdiv(tokens, chunk), chunk)


class Reduction:
    """What the kernels of one call have in common: the map, its heads, its split.

    Args:
        packed: A map `(B, H, W, parts * C)`.
        parts: Queries, keys, values and so on, of C channels each.
        heads: Heads of each.
    """

    # set once the tile is known
    split: Split

    def __init__(self, packed: Tensor, parts: int, heads: int) -> None:
        self.qkv, self.heads = rows_contiguous(packed), heads
        self.batch, self.height, self.width, channels = packed.shape
        self.channels = channels // parts
        self.dim = self.channels // heads
        self.problems = self.batch * heads

    def share_out(self, block: int) -> None:
        """Split the tokens, for tiles of `block`."""
        tokens = self.height * self.width
        self.split = split_tokens(self.qkv, self.problems, tokens, block)

    @property
    def grid(self) -> tuple[int, int]:
        """Programs of a pass over the tokens."""
        return self.problems, self.split.parts

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the map, its heads, and the tokens of a program."""
        return self.height, self.width, self.heads, self.split.chunk

    def empty(self, *shape: int) -> Tensor:
        """Sums of every image and head, `(B * heads, *shape)`, in float32."""
        return self.qkv.new_empty((self.problems, *shape), dtype=torch.float32)

    def empty_parts(self, *shape: int) -> Tensor:
        """The same of every part of the tokens, `(parts, B * heads, *shape)`."""
        return self.qkv.new_empty((*self.grid[::-1], *shape), dtype=torch.float32)


def add_parts(parts: Tensor) -> Tensor:
    """The sum over the parts, in a fixed order."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


@triton.jit
def locate_part(heads, chunk, H, W, D: tl.constexpr):
    """The problem and the part of a program: its image, first channel, first and last token."""
    problem, part = tl.program_id(0), tl.program_id(1)
    batch, start = problem // heads, problem % heads * D
    first = part * chunk
    return problem, batch, start, first, tl.minimum(first + chunk, H * W)


@triton.jit
def part_index(problem):
    """Where a program finds its place among the parts of all problems."""
    return tl.cast(tl.program_id(1), tl.int64) * tl.num_programs(0) + problem


@triton.jit
def load_square(ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A matrix `(D, D)`, zero beyond."""
    d = tl.arange(0, BLOCK_D)
    mask = (d < D)[:, None] & (d < D)[None, :]
    return tl.load(ptr + d[:, None] * D + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_square(ptr, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write a matrix `(D, D)`."""
    d = tl.arange(0, BLOCK_D)
    mask = (d < D)[:, None] & (d < D)[None, :]
    tl.store(ptr + d[:, None] * D + d[None, :], tile, mask=mask)


@triton.jit
def relu(x):
    """max(x, 0), which keeps what is no number."""
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def sum_outer(
    x, x_start, x_b, x_y, x_x, y, y_start, y_b, y_y, y_x,
    batch, first, last, H, W,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    RELU: tl.constexpr = False,
):  # fmt: skip
    """Sum of x[n, i] y[n, j] over tokens first..last of an image, `(BLOCK_D, BLOCK_D)`.

    With `RELU` of relu(x) and y, and beside it the sum of relu(x) `(BLOCK_D,)`, else zeros.
    """
    total = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        x_tokens, _, inside = locate_tokens(batch, n, H, W, x_b, x_y, x_x)
        y_tokens, _, _ = locate_tokens(batch, n, H, W, y_b, y_y, y_x)
        x_tile = load_tokens(x, None, x_start, x_tokens, inside, D, BLOCK_D)
        y_tile = load_tokens(y, None, y_start, y_tokens, inside, D, BLOCK_D)
        if RELU:
            x_tile = relu(x_tile)
            sums += x_tile
        total += tl.dot(tl.trans(x_tile), y_tile, input_precision=PRECISION)
    return total, tl.sum(sums, 0)
