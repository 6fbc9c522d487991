"""Launch of the kernels of weighted sums over windows: tiles, programs, outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._band_kernels import band_bwd_attn_kernel, band_bwd_value_kernel, band_fwd_kernel
from ._launch import cdiv, input_precision, next_power_of_2, rows_contiguous

Pair = tuple[int, int]

# neighbors of a row that a program owns: the fewest that the matrix units take
_OWNED = 16
# channels of a tile
_CHANNELS = 64


class _Call:
    """The arguments that all kernels of one call share."""

    def __init__(self, attn: Tensor, value: Tensor, size: Pair, dilation: Pair) -> None:
        self.attn, self.value = rows_contiguous(attn), rows_contiguous(value)
        self.size, self.dilation, self.dim = size, dilation, value.shape[-1]
        batch, heads, height, width, _ = value.shape
        # of one residue, of which there are fewer than columns if the map is small
        blocks = cdiv(cdiv(width, dilation[1]), _OWNED)
        self.rows = batch * heads * height * blocks * dilation[1]
        self.sizes = heads, height, width, blocks, *dilation
        # products of float32 leave the matrix units: their operands fill the registers
        most = _CHANNELS // 2 if value.dtype == torch.float32 else _CHANNELS
        self.block_d = min(most, max(16, next_power_of_2(self.dim)))

    @property
    def parts(self) -> int:
        """Blocks of channels."""
        return cdiv(self.dim, self.block_d)

    def options(self, owned: str, seen: str, most: int) -> dict[str, Any]:
        """Constants of a kernel whose programs own queries or keys and see up to `most` others."""
        return {
            "ROWS": self.size[0],
            "COLS": self.size[1],
            "D": self.dim,
            owned: _OWNED,
            seen: max(16, next_power_of_2(most)),
            "BLOCK_D": self.block_d,
            "PRECISION": input_precision(self.value),
            "num_warps": 4 if self.value.dtype == torch.float32 else 1,
            "num_stages": 2,
            "enable_fp_fusion": True,
        }

    def of_queries(self) -> dict[str, Any]:
        """Constants of a kernel whose programs own queries."""
        return self.options("BLOCK_Q", "BLOCK_K", _OWNED + self.size[1] - 1)

    def of_keys(self) -> dict[str, Any]:
        """Constants of a kernel whose programs own keys; near borders more queries see them."""
        return self.options("BLOCK_K", "BLOCK_Q", min(32, _OWNED + self.size[1] - 1))


def forward(attn: Tensor, value: Tensor, size: Pair, dilation: Pair) -> Tensor:
    """Launch the forward pass; see `backbones.ops.na2d_av`."""
    call = _Call(attn, value, size, dilation)
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    if out.numel():
        with torch.cuda.device_of(value):
            band_fwd_kernel[(call.rows, call.parts)](
                call.attn, call.value, out,
                *call.attn.stride()[:4], *call.value.stride()[:4], *call.sizes,
                **call.of_queries(),
            )  # fmt: skip
    return out


def backward(
    grad: Tensor, attn: Tensor, value: Tensor, size: Pair, dilation: Pair
) -> tuple[Tensor, Tensor]:
    """Launch the backward pass; see `backbones.ops.na2d_av`."""
    call = _Call(attn, value, size, dilation)
    grad_attn = torch.empty(attn.shape, dtype=attn.dtype, device=attn.device)
    grad_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    if grad.numel():
        with torch.cuda.device_of(value):
            band_bwd_attn_kernel[(call.rows,)](
                grad, call.value, grad_attn,
                *call.value.stride()[:4], *call.sizes, **call.of_queries(),
            )  # fmt: skip
            band_bwd_value_kernel[(call.rows, call.parts)](
                grad, call.attn, grad_value,
                *call.attn.stride()[:4], *call.sizes, **call.of_keys(),
            )  # fmt: skip
    return grad_attn, grad_value
