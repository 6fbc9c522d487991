"""Launch of the window attention kernels: tiles, programs, outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._windows import ONE_TILE, Windows, cells
from . import _window_kernels as whole
from . import _window_tiled_kernels as tiled
from ._launch import (
    Tile,
    cdiv,
    input_precision,
    multiprocessors,
    next_power_of_2,
    rows_contiguous,
)

# one tile of the backward pass over keys holds the queries of windows up to this size
_ALL_QUERIES = 256
# float32 partial sums of the bias gradient
_PARTIAL_BYTES = 16 << 20


def one_tile(keys: int, crowded: bool) -> Tile:
    """The tile that holds a window of at most 64 keys; `crowded` if it needs many registers."""
    block = max(16, next_power_of_2(keys))
    tile = Tile(block, block, num_warps=max(1, block // 16))
    return tile.doubled() if crowded else tile


def forward_tile(keys: int, wide: bool) -> Tile:
    """Tiles of the forward pass; `wide` for float32."""
    if wide:
        return Tile(64, 64, num_warps=8)
    # masks take the registers of the larger tile
    return Tile(64, 32 if keys % 64 else 64, num_warps=4)


def queries_tile(keys: int, wide: bool) -> Tile:
    """Tiles of the gradient of the queries."""
    return Tile(64, 32, num_warps=8, num_stages=1) if wide else forward_tile(keys, wide)


def keys_tile(keys: int, wide: bool) -> Tile:
    """Tiles of the gradient of keys and values, and of the bias if one holds all queries."""
    if keys > _ALL_QUERIES:
        return Tile(64, 64, num_warps=8, num_stages=1)
    block = next_power_of_2(keys)
    # masks take the registers that fetching ahead would need
    tile = Tile(block, 16, num_warps=8, num_stages=2 if keys == block else 1)
    return tile.doubled() if wide else tile


def bias_tile() -> Tile:
    """Tiles of the gradient of the bias, for windows of too many queries for one tile."""
    return Tile(64, 64, num_warps=8, num_stages=1)


class _Call:
    """The arguments that all kernels of one call share."""

    def __init__(
        self, qkv: Tensor, table: Tensor | None, pad: Tensor | None, windows: Windows
    ) -> None:
        self.qkv, self.table, self.pad, self.windows = rows_contiguous(qkv), table, pad, windows
        self.batch, self.height, self.width, packed = qkv.shape
        self.rows, self.cols = cells(self.height, self.width, windows.size)
        self.count = self.batch * self.rows * self.cols
        filled = (self.rows * windows.height, self.cols * windows.width)
        self.ragged = filled != (self.height, self.width)
        if not self.ragged:
            self.pad = None
        self.heads = windows.num_heads
        self.dim = packed // (3 * self.heads)
        self.wide = qkv.dtype == torch.float32

    @property
    def strides(self) -> tuple[int, ...]:
        """Of batch, rows and columns of the map, and of the table."""
        table = (0, 0, 0) if self.table is None else self.table.stride()
        return *self.qkv.stride()[:3], *table

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the map, and of the map of windows."""
        return self.height, self.width, self.rows, self.cols

    @property
    def channels(self) -> tuple[int, int, int]:
        """Channels of the output; from q to k to v; from one head to the next."""
        if self.windows.head_first:
            return self.heads * self.dim, self.dim, 3 * self.dim
        return self.heads * self.dim, self.heads * self.dim, self.dim

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments."""
        return {
            "D": self.dim,
            "P": self.windows.height,
            "Q": self.windows.width,
            "GRID": self.windows.grid,
            "RAGGED": self.ragged,
            "BLOCK_D": max(16, next_power_of_2(self.dim)),
            "PRECISION": input_precision(self.qkv),
        }

    def programs(self, waves: int, per_window: int) -> int:
        """Programs over windows, evenly loaded, where each window makes `per_window` of them."""
        wanted = max(1, waves * multiprocessors(self.qkv) // per_window)
        return cdiv(self.count, max(1, cdiv(self.count, wanted)))

    def groups(self, per_window: int) -> int:
        """Programs over windows that each hold a part of the gradient of the bias."""
        size = 4 * self.heads * self.windows.keys**2
        return min(self.programs(4, per_window), max(1, _PARTIAL_BYTES // size))

    def new_pairs(self, parts: int, row: int) -> Tensor | None:
        """Room for parts of the gradient of the bias; None if there is no table."""
        if self.table is None:
            return None
        shape = (parts, self.heads, row, row)
        return self.qkv.new_empty(shape, dtype=torch.float32)

    def new_vectors(self, parts: int) -> Tensor | None:
        """Room for parts of the gradient of `pad`; None if no token reads it."""
        if self.pad is None:
            return None
        return self.qkv.new_empty((parts, 3 * self.heads * self.dim), dtype=torch.float32)


def forward(
    qkv: Tensor, table: Tensor | None, pad: Tensor | None, windows: Windows
) -> tuple[Tensor, Tensor]:
    """Launch the forward pass; see `backbones.ops.window_attention`.

    Returns:
        The output `(B, H, W, C)`, and the logsumexp of the scores `(B, H, W, heads)`, which is
        empty for windows of one tile.
    """
    call = _Call(qkv, table, pad, windows)
    out = qkv.new_empty((*qkv.shape[:3], call.heads * call.dim))
    with torch.cuda.device_of(qkv):
        if windows.keys <= ONE_TILE:
            tile = one_tile(windows.keys, call.wide)
            whole.window_fwd_kernel[(call.heads, call.programs(8, call.heads))](
                call.qkv, call.table, call.pad, out,
                *call.strides, *call.sizes, call.count, windows.scale, *call.channels,
                **call.constants, BLOCK_N=tile.block_n, **tile.options,
            )  # fmt: skip
            return out, qkv.new_empty(0, dtype=torch.float32)
        tile = forward_tile(windows.keys, call.wide)
        lse = qkv.new_empty((*qkv.shape[:3], call.heads), dtype=torch.float32)
        blocks = cdiv(windows.keys, tile.block_m)
        tiled.window_tiled_fwd_kernel[(call.count * call.heads * blocks,)](
            call.qkv, call.table, call.pad, out, lse,
            *call.strides, *call.sizes, windows.scale, *call.channels,
            **call.constants, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **tile.options,
        )  # fmt: skip
        return out, lse


def backward(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor | None,
    pad: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    windows: Windows,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward pass.

    Returns:
        The gradients of `qkv`, `table` and `pad`; of what is None an empty tensor.
    """
    call = _Call(qkv, table, pad, windows)
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    with torch.cuda.device_of(qkv):
        if windows.keys <= ONE_TILE:
            pairs, vectors = _backward_one_tile(call, grad, grad_qkv)
        else:
            assert out is not None and lse is not None
            pairs, vectors = _backward_tiled(call, grad, out, lse, grad_qkv)
        absent = qkv.new_empty(0)
        grad_table = absent if table is None else _sum_offsets(pairs, windows).to(table.dtype)
    if pad is None:
        return grad_qkv, grad_table, absent
    if vectors is None:
        return grad_qkv, grad_table, torch.zeros_like(pad)
    return grad_qkv, grad_table, vectors.sum(0).to(pad.dtype)


def _backward_one_tile(
    call: _Call, grad: Tensor, grad_qkv: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    tile = one_tile(call.windows.keys, call.wide or (call.ragged and call.table is not None))
    tile = replace(tile, num_stages=1)
    programs = call.programs(4, call.heads)
    pairs, vectors = call.new_pairs(programs, tile.block_n), call.new_vectors(programs)
    whole.window_bwd_kernel[(call.heads, programs)](
        grad, call.qkv, call.table, call.pad, grad_qkv, pairs, vectors,
        *call.strides, *call.sizes, call.count, call.windows.scale, *call.channels,
        **call.constants, BLOCK_N=tile.block_n, **tile.options,
    )  # fmt: skip
    return pairs, vectors


def _backward_tiled(
    call: _Call, grad: Tensor, out: Tensor, lse: Tensor, grad_qkv: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    keys, scale = call.windows.keys, call.windows.scale
    delta = torch.empty_like(lse)
    tile = queries_tile(keys, call.wide)
    tiled.window_tiled_queries_kernel[(call.count * call.heads * cdiv(keys, tile.block_m),)](
        grad, call.qkv, call.table, call.pad, out, lse, delta, grad_qkv,
        *call.strides, *call.sizes, scale, *call.channels,
        **call.constants, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **tile.options,
    )  # fmt: skip

    tile = keys_tile(keys, call.wide)
    blocks, all_queries = cdiv(keys, tile.block_n), tile.block_m >= keys
    groups = call.groups(call.heads * blocks)
    pairs = call.new_pairs(groups, keys) if all_queries else None
    vectors = call.new_vectors(groups * blocks)
    tiled.window_tiled_keys_kernel[(blocks, call.heads, groups)](
        grad, call.qkv, call.table, call.pad, lse, delta, grad_qkv, pairs, vectors,
        *call.strides, *call.sizes, call.count, scale, *call.channels,
        **call.constants, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **tile.options,
    )  # fmt: skip
    if call.table is None or all_queries:
        return pairs, vectors

    tile = bias_tile()
    blocks = cdiv(keys, tile.block_m) * cdiv(keys, tile.block_n)
    groups = call.groups(call.heads * blocks)
    pairs = call.new_pairs(groups, keys)
    tiled.window_tiled_bias_kernel[(blocks, call.heads, groups)](
        grad, call.qkv, call.table, call.pad, lse, delta, pairs,
        *call.strides, *call.sizes, call.count, scale, *call.channels,
        **call.constants, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **tile.options,
    )  # fmt: skip
    return pairs, vectors


def _sum_offsets(pairs: Tensor | None, windows: Windows) -> Tensor:
    """The gradient of the table of partial gradients of the bias `(parts, heads, row, row)`."""
    assert pairs is not None
    p, q = windows.size
    out = pairs.new_empty((windows.num_heads, 2 * p - 1, 2 * q - 1))
    whole.offset_sum_kernel[((2 * p - 1) * (2 * q - 1), windows.num_heads)](
        pairs.sum(0),
        out,
        ROW=pairs.shape[-1],
        P=p,
        Q=q,
        BLOCK=64,
        num_warps=1,
        enable_fp_fusion=True,
    )
    return out
