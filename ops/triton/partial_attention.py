"""Launch of the partial attention kernels: tiles, programs, outputs."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor

from . import _partial_kernels as kernels
from ._launch import Tile, cdiv, input_precision, next_power_of_2, rows_contiguous

# channels that pass, copied at a time
_BLOCK_C = 128
# elements of the widest load, 16 bytes of a 16-bit type
_ALIGN = 8


def one_tile(tokens: int, wide: bool) -> Tile | None:
    """The tile that holds an image, None if it is too large; `wide` for float32."""
    block = max(16, next_power_of_2(tokens))
    if block > (32 if wide else 64):
        return None
    tile = Tile(block, block, num_warps=block // 8, num_stages=1)
    return tile.doubled() if wide else tile


def forward_tile(wide: bool) -> Tile:
    """Tiles of the forward pass."""
    return Tile(32, 32, num_warps=8) if wide else Tile(64, 64, num_warps=4)


def queries_tile(wide: bool) -> Tile:
    """Tiles of the gradient of the queries."""
    return Tile(32, 32, num_warps=8, num_stages=1) if wide else Tile(64, 64, num_warps=4)


def keys_tile(wide: bool) -> Tile:
    """Tiles of the gradient of keys and values."""
    return Tile(16, 32, num_warps=8, num_stages=1) if wide else Tile(32, 64, num_warps=8)


def value_blocks(values: int) -> tuple[int, int]:
    """Channels of the two tiles of values; 0 if one is enough."""
    if values <= 64:
        return max(16, next_power_of_2(values)), 0
    first = next_power_of_2(values + 1) // 2
    rest = values - first
    return first, max(16, next_power_of_2(rest)) if rest else 0


class _Map:
    """A map `(B, H, W, channels)` and what tells the compiler how wide to load it."""

    def __init__(self, x: Tensor) -> None:
        self.tensor = rows_contiguous(x)
        strides = self.tensor.stride()[:3]
        self.align = gcd(_ALIGN, *strides)
        self.strides = [stride // self.align for stride in strides]


class _Call:
    """The arguments that all kernels of one call share."""

    def __init__(self, qkv: Tensor, x: Tensor, qk_dim: int, scale: float) -> None:
        self.qkv, self.scale = _Map(qkv), scale
        self.batch, self.height, self.width = qkv.shape[:3]
        self.tokens = self.height * self.width
        self.dim, self.values, self.channels = qk_dim, qkv.shape[-1] - 2 * qk_dim, x.shape[-1]
        self.wide = qkv.dtype == torch.float32

    def programs(self, block: int) -> tuple[int]:
        """The grid for blocks of tokens of every image."""
        return (self.batch * cdiv(self.tokens, block),)

    @property
    def sizes(self) -> tuple[int, int, float]:
        """Of the map, and the scale."""
        return self.height, self.width, self.scale

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of all kernels."""
        block_v, block_r = value_blocks(self.values)
        return {
            "D": self.dim,
            "P": self.values,
            "C": self.channels,
            "ALIGN": self.qkv.align,
            "BLOCK_D": max(16, next_power_of_2(self.dim)),
            "BLOCK_V": block_v,
            "BLOCK_R": block_r,
            "PRECISION": input_precision(self.qkv.tensor),
        }


def forward(qkv: Tensor, x: Tensor, qk_dim: int, scale: float) -> tuple[Tensor, Tensor]:
    """Launch the forward pass; see `backbones.ops.partial_attention`.

    Returns:
        The output `(B, H, W, C)`, and the logsumexp of the scores `(B, H, W)`.
    """
    call, passed = _Call(qkv, x, qk_dim, scale), _Map(x)
    out, lse = x.new_empty(x.shape), x.new_empty(x.shape[:3], dtype=torch.float32)
    tile = one_tile(call.tokens, call.wide) or forward_tile(call.wide)
    with torch.cuda.device_of(qkv):
        kernels.partial_fwd_kernel[call.programs(tile.block_m)](
            call.qkv.tensor, passed.tensor, out, lse,
            *call.qkv.strides, *passed.strides, *call.sizes,
            **call.constants, ALIGN_X=passed.align, BLOCK_C=_BLOCK_C,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **tile.options,
        )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, qk_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Launch the backward pass.

    Returns:
        The gradients of `qkv` and `x`.
    """
    call = _Call(qkv, out, qk_dim, scale)
    grad_qkv, grad_x = qkv.new_empty(qkv.shape), out.new_empty(out.shape)
    tile = one_tile(call.tokens, call.wide)
    with torch.cuda.device_of(qkv):
        if tile is not None:
            kernels.partial_bwd_kernel[(call.batch,)](
                grad, call.qkv.tensor, out, lse, grad_qkv, grad_x, *call.qkv.strides, *call.sizes,
                **call.constants, BLOCK_C=_BLOCK_C, BLOCK_N=tile.block_n, **tile.options,
            )  # fmt: skip
        else:
            _backward_tiled(call, grad, out, lse, grad_qkv, grad_x)
    return grad_qkv, grad_x


def _backward_tiled(
    call: _Call, grad: Tensor, out: Tensor, lse: Tensor, grad_qkv: Tensor, grad_x: Tensor
) -> None:
    delta, tile = torch.empty_like(lse), queries_tile(call.wide)
    kernels.partial_queries_kernel[call.programs(tile.block_m)](
        grad, call.qkv.tensor, out, lse, delta, grad_qkv, grad_x, *call.qkv.strides, *call.sizes,
        **call.constants, BLOCK_C=_BLOCK_C,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **tile.options,
    )  # fmt: skip
    tile = keys_tile(call.wide)
    kernels.partial_keys_kernel[call.programs(tile.block_n)](
        grad, call.qkv.tensor, out, lse, delta, grad_qkv, *call.qkv.strides, *call.sizes,
        **call.constants, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **tile.options,
    )  # fmt: skip
