"""Launch of the neighborhood attention kernels: tiles, programs, outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._launch import Tile, cdiv, input_precision, next_power_of_2, rows_contiguous
from ._neighborhood_backward_kernels import (
    neighborhood_bwd_keys_kernel,
    neighborhood_bwd_queries_kernel,
)
from ._neighborhood_kernels import neighborhood_fwd_kernel

Pair = tuple[int, int]

# rows, and columns, of the tile that a program owns
_TILE = 8
# columns of the blocks around it: for kernels of up to 9 one holds all
_COLUMNS = 16
# channels that a program takes at once, of heads of more than twice as many
_PART = 64
# shifts that the kernels take
_SHIFTS = 4


def tile_of(dim: int, wide: bool) -> Tile:
    """Tiles of scores, for heads of `dim` channels; `wide` for float32."""
    return Tile(_TILE**2, 32, num_warps=8 if wide or _PART < dim <= 2 * _PART else 4)


def channels_of(dim: int, wide: bool) -> int:
    """Channels that a program takes at once."""
    # products of float32 leave the matrix units: their operands fill the registers
    part = _PART // 2 if wide else _PART
    return part if dim > 2 * part else max(16, next_power_of_2(dim))


class _Call:
    """The arguments that all kernels of one call share."""

    def __init__(
        self,
        qkv: Tensor,
        num_heads: int,
        kernel_size: Pair,
        dilation: Pair,
        scale: float,
        clamp: bool,
        shifts: Sequence[int],
    ) -> None:
        self.qkv, self.scale, self.clamp = rows_contiguous(qkv), scale, clamp
        self.batch, self.height, self.width, packed = qkv.shape
        self.heads, self.dim = num_heads, packed // (3 * num_heads)
        self.kernel_size, self.dilation, self.shifts = kernel_size, dilation, shifts
        self.block_d = channels_of(self.dim, qkv.dtype == torch.float32)

    @property
    def blocks(self) -> Pair:
        """Tiles along the axes of a residue."""
        rows = cdiv(cdiv(self.height, self.dilation[0]), _TILE)
        return rows, cdiv(cdiv(self.width, self.dilation[1]), _TILE)

    @property
    def grid(self) -> Pair:
        """Programs: tiles of the residues that there are, and parts of the channels."""
        residues = min(self.dilation[0], self.height) * min(self.dilation[1], self.width)
        tiles = self.blocks[0] * self.blocks[1]
        return self.batch * self.heads * residues * tiles, cdiv(self.dim, self.block_d)

    @property
    def rolls(self) -> list[int]:
        """How many shifts there are, and the pixel that each brings to the origin."""
        pairs = list(zip(self.shifts[::2], self.shifts[1::2], strict=True)) or [(0, 0)]
        assert len(pairs) <= _SHIFTS
        pixels = [y % self.height * self.width + x % self.width for y, x in pairs]
        return [len(pairs), *pixels, *[0] * (_SHIFTS - len(pairs))]

    @property
    def sizes(self) -> tuple[Any, ...]:
        """Arguments behind the tensors."""
        strides, size = self.qkv.stride()[:3], (self.heads, self.height, self.width)
        return *strides, *size, *self.dilation, *self.blocks, *self.rolls, self.scale

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments and options of a launch."""
        tile = tile_of(self.dim, self.qkv.dtype == torch.float32)
        return {
            "D": self.dim,
            "ROWS": self.kernel_size[0],
            "COLS": self.kernel_size[1],
            "CLAMP": self.clamp,
            "TILE": _TILE,
            "BLOCK_Y": tile.block_n // _COLUMNS,
            "BLOCK_X": _COLUMNS,
            "BLOCK_D": self.block_d,
            "PRECISION": input_precision(self.qkv),
            **tile.options,
        }


def forward(
    qkv: Tensor,
    num_heads: int,
    kernel_size: Pair,
    dilation: Pair,
    scale: float,
    clamp: bool,
    shifts: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Launch the forward pass; see `backbones.ops.neighborhood_attention`.

    Args:
        qkv: Packed map `(B, H, W, 3C)`.
        num_heads: Number of heads.
        kernel_size: Rows and columns of a window, odd.
        dilation: Distance of its rows and columns.
        scale: Factor of the scores.
        clamp: Whether windows are moved inside the map, else zeros surround it.
        shifts: Rows and columns, in turn, of up to four shifts.

    Returns:
        The output `(B, H, W, C)`, and the logsumexp of the scores `(B, heads, H, W)`, base 2.
    """
    call = _Call(qkv, num_heads, kernel_size, dilation, scale, clamp, shifts)
    size = call.batch, call.height, call.width
    out = qkv.new_empty((*size, call.heads * call.dim))
    lse = qkv.new_empty((size[0], call.heads, *size[1:]), dtype=torch.float32)
    if out.numel():
        with torch.cuda.device_of(qkv):
            neighborhood_fwd_kernel[call.grid](call.qkv, out, lse, *call.sizes, **call.constants)
    return out, lse


def backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    kernel_size: Pair,
    dilation: Pair,
    scale: float,
    clamp: bool,
    shifts: Sequence[int],
) -> Tensor:
    """Launch the backward pass, for a contiguous `grad`.

    Returns:
        The gradient of `qkv`, contiguous.
    """
    call = _Call(qkv, num_heads, kernel_size, dilation, scale, clamp, shifts)
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if grad.numel():
        delta = torch.empty_like(lse)
        with torch.cuda.device_of(qkv):
            neighborhood_bwd_queries_kernel[call.grid](
                grad, call.qkv, out, lse, delta, grad_qkv, *call.sizes, **call.constants
            )
            neighborhood_bwd_keys_kernel[call.grid](
                grad, call.qkv, lse, delta, grad_qkv, *call.sizes, **call.constants
            )
    return grad_qkv
