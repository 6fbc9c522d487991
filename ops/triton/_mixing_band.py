"""Launch of dynamic mixing where windows are many: row by row, by banded matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._launch import Tile, cdiv, multiprocessors, next_power_of_2
from ._mixing import Half
from ._mixing_band_backward_kernels import mixing_band_kernel_kernel, mixing_band_value_kernel
from ._mixing_band_kernels import mixing_band_fwd_kernel, mixing_band_query_kernel

# neighbors of a row that a program owns: the fewest that the matrix units take
_OWNED = 16
# programs of the gradient of the kernels, per multiprocessor, that need no parts; rows of a part
_ENOUGH, _ROWS = 8, 8
# bytes that gradients of logits may take: beyond, programs sum those of several images
_SCRATCH = 1 << 25


def _options(half: Half, tile: Tile) -> dict[str, Any]:
    """Constants and options of a launch."""
    fixed = {"BLOCK_Q": tile.block_m, "BLOCK_K": tile.block_n}
    slots = max(16, next_power_of_2(half.size))
    return half.constants | tile.options | fixed | {"BLOCK_S": slots}


def queries_tile(half: Half) -> Tile:
    """Queries that a program owns, and keys of their windows."""
    return Tile(_OWNED, next_power_of_2(_OWNED + half.size - 1), 4 if half.wide else 1)


def sums_tile(half: Half) -> Tile:
    """The same for a program that sums over many rows, which takes more registers."""
    tile = Tile(_OWNED, queries_tile(half).block_n, 2)
    return tile.doubled() if half.wide else tile


def keys_tile(half: Half) -> Tile:
    """Keys that a program owns, and queries that see them: near borders there are more."""
    return Tile(32, _OWNED, 4 if half.wide else 2, num_stages=1)


def _blocks(half: Half) -> int:
    """Blocks of a row."""
    return cdiv(half.width, _OWNED)


def _grid(half: Half) -> tuple[int]:
    """Programs that own a block each."""
    return (half.batch * half.heads * half.height * _blocks(half),)


def _shared(half: Half) -> tuple[Tensor, ...]:
    """The inputs as the kernels take them."""
    kernel, bias = half.kernel[..., half.slot :], half.bias[half.slot :]
    return half.query, kernel, half.value[..., half.channel :], bias, half.table


def _sizes(half: Half) -> tuple[int, ...]:
    return half.height, half.width, half.heads, _blocks(half)


def forward(half: Half, out: Tensor, lse: Tensor) -> None:
    """Compute one half of the output; see `_mixing_class.forward`."""
    mixing_band_fwd_kernel[_grid(half)](
        *_shared(half), out[..., half.channel :], lse,
        *half.strides, *_sizes(half), out.shape[-1], **_options(half, queries_tile(half)),
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
    """Compute what one half gives to the gradients; see `_mixing_class.backward`."""
    query, kernel, value, bias, table = _shared(half)
    grad, out, grad_value = (x[..., half.channel :] for x in (grad, out, grad_value))
    delta, channels = torch.empty_like(lse), half.value.shape[-1]
    mixing_band_query_kernel[_grid(half)](
        grad, query, kernel, value, bias, table, out, lse, added, grad_query, delta,
        *half.strides, *_sizes(half), channels, **_options(half, queries_tile(half)),
    )  # fmt: skip
    mixing_band_value_kernel[_grid(half)](
        grad, query, kernel, bias, table, lse, grad_value,
        *half.strides[:6], *_sizes(half), channels, **_options(half, keys_tile(half)),
    )  # fmt: skip
    kernels, logits = _kernel_gradients(half, grad, lse, delta)
    slots = slice(half.slot, half.slot + half.size**2)
    grad_kernel[..., slots] = kernels.sum(0)
    return logits.sum(0)


def _kernel_gradients(
    half: Half, grad: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of kernels, in parts, and of logits, in groups of images, both float32."""
    slots, blocks = half.size**2, _blocks(half)
    parts, chunk = _parts(half)
    images = _images(half, parts)
    groups = cdiv(half.batch, images)
    # of rows that have the same slot in their own window, those of a part are summed
    logits = lse.new_zeros((groups, half.heads, half.size - 1 + parts, half.width, slots))
    kernels = lse.new_empty((parts * blocks, half.batch, half.heads, half.dim, slots))
    mixing_band_kernel_kernel[(half.size * half.heads * blocks * parts, groups)](
        grad, *_shared(half), lse, delta, kernels, logits,
        *half.strides, *_sizes(half), half.batch, images, parts, chunk, half.value.shape[-1],
        **_options(half, sums_tile(half)),
    )  # fmt: skip
    return kernels, logits


def _parts(half: Half) -> tuple[int, int]:
    """Parts of the rows of the map, for programs enough, and rows of each."""
    programs = half.batch * half.heads * half.size * _blocks(half)
    wanted = max(1, cdiv(_ENOUGH * multiprocessors(half.query), programs))
    chunk = cdiv(half.height, min(wanted, cdiv(half.height, _ROWS)))
    return cdiv(half.height, chunk), chunk


def _images(half: Half, parts: int) -> int:
    """Images of which a program sums the gradients of logits."""
    numbers = half.heads * (half.size - 1 + parts) * half.width * half.size**2
    return cdiv(half.batch, max(1, _SCRATCH // (4 * numbers)))
