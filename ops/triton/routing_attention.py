"""Launch of the routing attention kernels: tiles, programs, outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._regions import Regions
from . import _routing_dense_kernels as dense
from . import _routing_kernels as listed
from ._launch import Tile, cdiv, input_precision, next_power_of_2, rows_contiguous

# below so many tokens in a region tiles of lists are mostly empty
_FEW_TOKENS = 16
# bits of a mask
_MASK = 64


def queries_tile(tokens: int, wide: bool) -> Tile:
    """Tiles of the forward pass and of the gradient of the queries; `wide` for float32."""
    block = min(64, max(16, next_power_of_2(tokens)))
    warps = block // 16
    return Tile(block, 32, 2 * warps, num_stages=1) if wide else Tile(block, 64, warps)


def keys_tile(tokens: int, wide: bool) -> Tile:
    """Tiles of the gradient of keys and values."""
    block = min(64, max(16, next_power_of_2(tokens)))
    tile = Tile(64, block, num_warps=4)
    return tile.doubled() if wide else tile


def dense_tile(wide: bool) -> Tile:
    """Tiles of the forward pass over all tokens of an image."""
    return Tile(64, 32, num_warps=4, num_stages=1) if wide else Tile(64, 64, num_warps=4)


def dense_gradient_tile(wide: bool) -> Tile:
    """Tiles of the backward pass over all tokens of an image: three sums at once."""
    return Tile(64, 32, num_warps=8, num_stages=1) if wide else Tile(64, 16, num_warps=4)


class _Call:
    """The arguments that all kernels of one call share."""

    def __init__(
        self,
        qkv: Tensor,
        regions: Tensor,
        pad: Tensor | None,
        num_heads: int,
        at: Regions,
        scale: float,
    ) -> None:
        self.qkv, self.regions = rows_contiguous(qkv), regions.contiguous()
        self.batch, self.height, self.width, packed = qkv.shape
        self.at, self.heads, self.scale = at, num_heads, scale
        # read by no token of a map that the regions fill
        filled = at.filled(self.height, self.width)
        self.pad = None if filled or pad is None else pad.contiguous()
        self.channels = packed // 3
        self.wide = qkv.dtype == torch.float32

    @property
    def is_dense(self) -> bool:
        """Whether programs read all tokens of an image and mask their scores."""
        return self.at.tokens < _FEW_TOKENS and self.at.regions <= _MASK

    @property
    def masks(self) -> Tensor:
        """Which regions each region chose, bit by bit `(B, R)`."""
        return (1 << self.regions).sum(-1)

    @property
    def layout(self) -> tuple[int, ...]:
        """Strides of the map, its size, and how it is divided."""
        strides, at = self.qkv.stride()[:3], self.at
        return *strides, self.height, self.width, at.regions, at.cols, at.height, at.width

    def constants(self, tile: Tile) -> dict[str, Any]:
        """Compile-time arguments."""
        dim = self.channels // self.heads
        return {
            "D": dim,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_D": max(16, next_power_of_2(dim)),
            "PRECISION": input_precision(self.qkv),
            **tile.options,
        }

    def programs(self, tokens: int, block: int) -> tuple[int]:
        """The grid: blocks of tokens, of each of the groups that there are of as many."""
        groups = self.batch * self.at.tokens * self.at.regions // tokens
        return (groups * self.heads * cdiv(tokens, block),)

    def new_vectors(self, parts: int) -> Tensor | None:
        """Room for parts of the gradient of `pad`; None if no token reads it."""
        if self.pad is None:
            return None
        return self.qkv.new_empty((parts, 2 * self.channels), dtype=torch.float32)


def forward(
    qkv: Tensor, regions: Tensor, pad: Tensor | None, num_heads: int, at: Regions, scale: float
) -> tuple[Tensor, Tensor]:
    """Launch the forward pass; see `backbones.ops.routing_attention`.

    Returns:
        The output `(B, H, W, C)`, and the logsumexp of the scores `(B, H, W, heads)`.
    """
    call = _Call(qkv, regions, pad, num_heads, at, scale)
    out = qkv.new_empty((*qkv.shape[:3], call.channels))
    lse = qkv.new_empty((*qkv.shape[:3], num_heads), dtype=torch.float32)
    if not out.numel():
        return out, lse
    with torch.cuda.device_of(qkv):
        if call.is_dense:
            tile = dense_tile(call.wide)
            dense.routing_dense_fwd_kernel[call.programs(at.regions * at.tokens, tile.block_m)](
                call.qkv, call.masks, call.pad, out, lse,
                *call.layout, scale, call.channels, **call.constants(tile),
            )  # fmt: skip
        else:
            tile = queries_tile(at.tokens, call.wide)
            listed.routing_fwd_kernel[call.programs(at.tokens, tile.block_m)](
                call.qkv, call.regions, call.pad, out, lse,
                *call.layout, call.regions.shape[2], scale, call.channels, **call.constants(tile),
            )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor,
    qkv: Tensor,
    regions: Tensor,
    pad: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    at: Regions,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Launch the backward pass.

    Returns:
        The gradients of `qkv` and `pad`; of what is None an empty tensor.
    """
    call = _Call(qkv, regions, pad, num_heads, at, scale)
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    vectors = None
    if out.numel():
        launch = _backward_dense if call.is_dense else _backward_listed
        with torch.cuda.device_of(qkv):
            vectors = launch(call, grad, out, lse, grad_qkv)
    if pad is None:
        return grad_qkv, qkv.new_empty(0)
    grad_pad = torch.zeros_like(pad)
    if vectors is not None:
        grad_pad[call.channels :] = vectors.sum(0)
    return grad_qkv, grad_pad


def _backward_dense(
    call: _Call, grad: Tensor, out: Tensor, lse: Tensor, grad_qkv: Tensor
) -> Tensor | None:
    tile, tokens = dense_gradient_tile(call.wide), call.at.regions * call.at.tokens
    vectors = call.new_vectors(call.batch * cdiv(tokens, tile.block_m))
    dense.routing_dense_bwd_kernel[call.programs(tokens, tile.block_m)](
        grad, call.qkv, call.masks, call.pad, out, lse, grad_qkv, vectors,
        *call.layout, call.scale, call.channels, **call.constants(tile),
    )  # fmt: skip
    return vectors


def _backward_listed(
    call: _Call, grad: Tensor, out: Tensor, lse: Tensor, grad_qkv: Tensor
) -> Tensor | None:
    tokens, count, topk = call.at.tokens, call.at.regions, call.regions.shape[2]
    delta = torch.empty_like(lse)
    tile = queries_tile(tokens, call.wide)
    listed.routing_queries_kernel[call.programs(tokens, tile.block_m)](
        grad, call.qkv, call.regions, call.pad, out, lse, delta, grad_qkv,
        *call.layout, topk, call.scale, call.channels, **call.constants(tile),
    )  # fmt: skip

    lists = call.regions.new_empty((call.batch, count, count), dtype=torch.int32)
    counts = lists.new_empty((call.batch, count))
    listed.routing_lists_kernel[(call.batch * count,)](
        call.regions, lists, counts, count, topk,
        BLOCK=64, num_warps=1, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    tile = keys_tile(tokens, call.wide)
    vectors = call.new_vectors(call.batch * count * cdiv(tokens, tile.block_n))
    listed.routing_keys_kernel[call.programs(tokens, tile.block_n)](
        grad, call.qkv, lists, counts, call.pad, lse, delta, grad_qkv, vectors,
        *call.layout, call.scale, call.channels, **call.constants(tile),
    )  # fmt: skip
    return vectors
