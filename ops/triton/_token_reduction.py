"""Sums over all tokens of an image, for attention whose cost is linear in them.

Pass one reduces the tokens of an image and a head to a small state, pass two applies it to each.
Where images and heads are enough to fill the device, one program does both and the state stays in
its registers. Where they are not, several programs each sum a part of the tokens; the parts are
added in a fixed order, and as many programs apply the sum.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, multiprocessors
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


@triton.jit
def sum_outer(
    x, x_start, x_b, x_y, x_x, y, y_start, y_b, y_y, y_x,
    batch, first, last, H, W,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum of x[n, i] y[n, j] over tokens first..last of an image, `(BLOCK_D, BLOCK_D)`."""
    total = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        x_tokens, _, inside = locate_tokens(batch, n, H, W, x_b, x_y, x_x)
        y_tokens, _, _ = locate_tokens(batch, n, H, W, y_b, y_y, y_x)
        x_tile = load_tokens(x, None, x_start, x_tokens, inside, D, BLOCK_D)
        y_tile = load_tokens(y, None, y_start, y_tokens, inside, D, BLOCK_D)
        total += tl.dot(tl.trans(x_tile), y_tile, input_precision=PRECISION)
    return total
