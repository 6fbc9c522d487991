"""Launch of dynamic mixing where queries of the same window start form a class."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ._launch import Tile, cdiv, multiprocessors, next_power_of_2
from ._mixing import Half
from ._mixing_class_backward_kernels import (
    mixing_class_queries_kernel,
    mixing_class_slots_kernel,
    mixing_class_values_kernel,
)
from ._mixing_class_kernels import mixing_class_fwd_kernel

# float32 partial sums of the gradient of the logits
_PARTIAL_BYTES = 16 << 20


def largest_class(half: Half) -> int:
    """Queries of the largest class: those of a corner, or all rows or columns if they share one."""
    rows, cols = (half.size if count == 1 else half.size // 2 + 1 for count in half.windows)
    return rows * cols


def slots_tile(half: Half) -> Tile:
    """Queries, and slots or keys, of a tile that a program keeps or walks along."""
    block_m = min(64, max(16, next_power_of_2(largest_class(half))))
    tile = Tile(block_m, 32, num_warps=max(1, block_m // 16), num_stages=1)
    return tile.doubled() if half.wide else tile


def queries_tile(half: Half) -> Tile:
    """Queries and slots of a tile of a program that serves queries: all slots if they are few."""
    tile = slots_tile(half)
    return replace(tile, block_n=64) if 32 < half.size**2 <= 64 else tile


def _blocks(half: Half, tile: Tile) -> tuple[int, int]:
    """Blocks of queries, and those of one class."""
    parts = cdiv(largest_class(half), tile.block_m)
    return half.windows[0] * half.windows[1] * parts, parts


def _options(half: Half, tile: Tile) -> dict[str, Any]:
    """Compile-time arguments and options of a launch."""
    tiles = {"BLOCK_Q": tile.block_m, "BLOCK_N": tile.block_n}
    return {**half.constants, **tiles, **tile.options}


def forward(half: Half, out: Tensor, lse: Tensor) -> None:
    """Compute one half of the output.

    Args:
        half: The inputs.
        out: Where the output is written, `(B, H, W, C)`, from channel `half.channel` on.
        lse: Where the logsumexp of the logits is written, `(B, G, H, W)`, float32.
    """
    tile = queries_tile(half)
    blocks, parts = _blocks(half, tile)
    mixing_class_fwd_kernel[(half.batch * half.heads * blocks,)](
        half.query, half.kernel, half.value, half.bias, half.table, out, lse,
        *half.strides, half.height, half.width, half.heads, blocks, parts,
        half.slot, half.channel, out.shape[-1], **_options(half, tile),
    )  # fmt: skip


def backward(
    half: Half,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    added: Tensor | None,
    grad_query: Tensor,
    grad_kernel: Tensor,
    grad_value: Tensor,
) -> Tensor:
    """Compute what one half gives to the gradients.

    Args:
        half: The inputs.
        grad: Gradient of the output `(B, H, W, C)`.
        out: The output, of both halves.
        lse: The logsumexp of the logits of this half.
        added: What to add to the gradient of the queries, like it, float32; None for nothing.
        grad_query: Where that is written, `(B, H, W, C / 2)`, float32 or the type of the queries.
        grad_kernel: Where that of the kernels is written, `(B, G, D, S)`, from `half.slot` on.
        grad_value: Where that of the values is written, `(B, H, W, C)`, from `half.channel` on.

    Returns:
        The gradient of the logits summed over the batch, `(G, H', W', K * K)`, float32: of every
        pixel, or with H' = W' = K of every place in a window, pixels of one place summed.
    """
    channels, tile = grad.shape[-1], queries_tile(half)
    blocks, parts = _blocks(half, tile)
    sizes = (half.height, half.width, half.heads, blocks, parts, half.slot, half.channel, channels)
    delta = torch.empty_like(lse)
    mixing_class_queries_kernel[(half.batch * half.heads * blocks,)](
        half.query, half.kernel, half.value, half.bias, half.table, grad, out, lse, delta,
        added, grad_query, *half.strides, *sizes, **_options(half, tile),
    )  # fmt: skip
    tile = slots_tile(half)
    tiles = cdiv(half.height * half.width, tile.block_n)
    mixing_class_values_kernel[(half.batch * half.heads * tiles,)](
        half.query, half.kernel, half.bias, half.table, grad, lse, grad_value,
        *half.strides[:6], *sizes, **_options(half, tile),
    )  # fmt: skip
    return _backward_slots(half, grad, lse, delta, grad_kernel)


def _backward_slots(
    half: Half, grad: Tensor, lse: Tensor, delta: Tensor, grad_kernel: Tensor
) -> Tensor:
    """Write the gradient of the kernels; returns that of the logits of every pixel."""
    tile = slots_tile(half)
    blocks, parts = _blocks(half, tile)
    slots, pixels = half.size**2, half.height * half.width
    tiles = cdiv(slots, tile.block_n)
    chunk, groups = _groups(half, tile, tiles * blocks)
    kernels = lse.new_empty((blocks, half.batch, half.heads, half.dim, slots))
    logits = lse.new_empty((groups, half.heads, pixels, slots))
    mixing_class_slots_kernel[(groups * half.heads * blocks * tiles,)](
        half.query, half.kernel, half.value, half.bias, half.table, grad, lse, delta,
        kernels, logits,
        *half.strides, half.height, half.width, half.heads, blocks, parts,
        half.slot, half.channel, grad.shape[-1], half.batch, chunk, **_options(half, tile),
    )  # fmt: skip
    grad_kernel[..., half.slot : half.slot + slots] = kernels.sum(0)
    return logits.sum(0).unflatten(1, (half.height, half.width))


def _groups(half: Half, tile: Tile, programs: int) -> tuple[int, int]:
    """Images of a program that sums over them, and how many such groups there are."""
    size = 4 * half.heads * half.height * half.width * half.size**2
    wanted = 16 * multiprocessors(half.query) // (tile.num_warps * half.heads * programs)
    most = min(half.batch, max(1, wanted), max(1, _PARTIAL_BYTES // size))
    chunk = cdiv(half.batch, most)
    return chunk, cdiv(half.batch, chunk)
