"""Sums of a gradient of logits into those of a table of relative positions and of a bias."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from math import isqrt

import triton
import triton.language as tl
from torch import Tensor

from ._launch import next_power_of_2


@triton.jit(do_not_specialize=["H", "W"])
def mixing_fold_kernel(
    logits,  # (G, H, W, K * K), float32
    out,  # (G, 2K - 1, 2K - 1)
    H,
    W,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """A program serves one row of the table of one head: a slot per entry and pixel, or none."""
    row, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BLOCK_X)
    logits += tl.cast(head, tl.int64) * H * W * (K * K)
    total = tl.zeros((BLOCK_N, BLOCK_X), tl.float32)
    for first in range(0, H * W, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        y, x = n // W, n % W
        a = y + row - (K - 1) - tl.minimum(tl.maximum(y - K // 2, 0), H - K)
        left = tl.minimum(tl.maximum(x - K // 2, 0), W - K)
        b = (x - left - (K - 1))[:, None] + column[None, :]
        mask = ((n < H * W) & (a >= 0) & (a < K))[:, None] & (b >= 0) & (b < K)
        slots = n.to(tl.int64) * (K * K) + a * K
        total += tl.load(logits + slots[:, None] + b, mask=mask, other=0.0)
    out += (head * (2 * K - 1) + row) * (2 * K - 1)
    tl.store(out + column, tl.sum(total, 0), mask=column < 2 * K - 1)


def fold(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `backbones.ops._mixing.fold` does, in two launches.

    Args:
        logits: `(G, H', W', K * K)`, float32, contiguous.

    Returns:
        The gradients `(G, 2K - 1, 2K - 1)` of the table and `(K * K,)` of the bias.
    """
    heads, height, width, slots = logits.shape
    size = isqrt(slots)
    span = 2 * size - 1
    table = logits.new_empty((heads, span, span))
    mixing_fold_kernel[(span, heads)](
        logits, table, height, width, K=size, BLOCK_N=64, BLOCK_X=next_power_of_2(span),
        num_warps=4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    return table, logits.sum((0, 1, 2))
