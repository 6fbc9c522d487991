"""Launch of the Toeplitz kernels: depthwise convolutions of 11 by 11 taps and more, of stride 1.

The functions are those of `_depthwise_pytorch.py`. float32 is as exact as elsewhere, but spills:
`_choice.py` leaves it to PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _depthwise_pytorch as pytorch
from .._depthwise import Fused, Window
from ._depthwise_tiles import Maps
from ._launch import cdiv, input_precision, multiprocessors
from ._toeplitz_kernels import (
    toeplitz_conv_kernel,
    toeplitz_expand_kernel,
    toeplitz_grad_weight_kernel,
)

# of 8 channels a thread reads and writes 16 bytes; a warp multiplies one
BLOCK_M, BLOCK_C = 16, 8
# fewer rows would read more of their surroundings than of themselves
_LEAST_ROWS = 16


@dataclass(frozen=True)
class Strips:
    """Strips of a map that programs go down.

    Attributes:
        cols: Columns of a strip.
        across: Strips side by side.
        total: Strips of all images side by side.
        rows: Rows of a strip.
        down: Strips one below the other.
    """

    cols: int
    across: int
    total: int
    rows: int
    down: int

    @property
    def blocks(self) -> int:
        """Programs for the strips side by side."""
        return cdiv(self.total, BLOCK_M)


def columns() -> int:
    """Columns of a strip: with 16, the rows that wait do not fit the registers of NVIDIA GPUs."""
    # the matrix units of AMD GPUs take no 8
    return 8 if torch.version.hip is None else 16


def kernel_rows(kernel: int, dtype: torch.dtype) -> int:
    """Rows of the kernel whose gradients a program sums: shares of about what registers hold."""
    most = 3 if dtype == torch.float32 else 9
    return cdiv(kernel, cdiv(kernel, most))


def precision(x: Tensor) -> str:
    """How `tl.dot` is to multiply: float32 as it is, or in six products of bfloat16, as exact.

    Where no matrix unit takes float32, the operands of such dots do not fit the registers.
    """
    exact = input_precision(x)
    return "bf16x6" if x.dtype == torch.float32 and exact == "ieee" and not x.is_cpu else exact


def split_map(x: Tensor, cols: int) -> Strips:
    """Cut a map `(B, H, W, C)` into strips, whole columns of it if these fill the device."""
    batch, height, width, channels = x.shape
    across = cdiv(width, cols)
    programs = cdiv(batch * across, BLOCK_M) * cdiv(channels, BLOCK_C)
    down = min(cdiv(2 * multiprocessors(x), max(1, programs)), cdiv(height, _LEAST_ROWS))
    rows = cdiv(height, down)
    return Strips(cols, across, batch * across, rows, cdiv(height, rows))


def split_blocks(x: Tensor, blocks: int, groups: int) -> int:
    """Parts that the blocks of strips are summed in, for `groups` programs for each channel."""
    programs = groups * cdiv(x.shape[3], BLOCK_C)
    return max(1, min(blocks, cdiv(2 * multiprocessors(x), max(1, programs))))


def expand(weight: Tensor, cols: int, flip: bool) -> Tensor:
    """Write kernels `(C, 1, K, K)`, turned around with `flip`, as packed Toeplitz matrices."""
    channels, kernel = weight.shape[0], weight.shape[-1]
    blocks = cdiv(channels, BLOCK_C)
    matrices = weight.new_empty((blocks * BLOCK_C, kernel, 32 * cols))
    toeplitz_expand_kernel[(blocks, kernel)](
        weight.contiguous(), matrices, channels, kernel, cols, BLOCK_C, flip,
        num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return matrices


def _options(x: Tensor) -> dict[str, Any]:
    return {
        "BLOCK_M": BLOCK_M,
        "BLOCK_C": BLOCK_C,
        "PRECISION": precision(x),
        "num_warps": BLOCK_C,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def _convolve(
    x: Tensor,
    weight: Tensor,
    fused: Fused,
    flip: bool = False,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    grad: Tensor | None = None,
    grad_mean: Tensor | None = None,
    point: Tensor | None = None,
    mean: str = "",
) -> tuple[Tensor, Tensor]:
    # one of the three at most
    maps = Maps(x.shape[3], x, next((t for t in (addend, grad, point) if t is not None), None))
    rows, side = maps.maps
    (batch, height, width, channels), kernel = x.shape, weight.shape[-1]
    cols = columns()
    strips = split_map(x, cols)
    out = x.new_empty(x.shape)
    sums = x.new_empty((strips.total, strips.down, channels), dtype=torch.float32) if mean else None
    # a strip of all rows has nothing above and below it
    pad, whole = kernel // 2, strips.down == 1
    first, end = pad if whole else 0, strips.rows + 2 * pad
    with torch.cuda.device_of(x):
        toeplitz_conv_kernel[(cdiv(channels, BLOCK_C), strips.blocks, strips.down)](
            rows, expand(weight, cols, flip), bias if bias is None else bias.contiguous(),
            addend if addend is None else side, grad if grad is None else side,
            grad_mean if grad_mean is None else grad_mean.contiguous(),
            point if point is None else side, out, sums,
            *maps.strides, height, width, maps.channels, strips.across, strips.rows, strips.total,
            first, end - pad if whole else end, end,
            K=kernel, COLS=cols, RESIDUAL=fused.residual, PRE_ACT=fused.pre_act, ACT=fused.act,
            SUM=mean, ALIGN=maps.align, **_options(x),
        )  # fmt: skip
    if sums is None:
        return out, x.new_empty(0)
    means = sums.view(batch, strips.across * strips.down, channels).sum(1) / (height * width)
    return out, means if mean == "square" else means.to(x.dtype)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    at: Window,
    fused: Fused,
    mean: str,
) -> tuple[Tensor, Tensor]:
    """Compute the result `(B, H, W, C)`, and what `average` makes of it; nothing for ""."""
    assert at.stride == 1
    return _convolve(x, weight, fused, bias=bias, addend=addend, mean=mean)


def grad_sum(
    grad: Tensor,
    grad_mean: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    at: Window,
    fused: Fused,
) -> Tensor:
    """The gradient `(B, H, W, C)` of what the last activation takes."""
    if not fused.act:
        return pytorch.grad_sum(grad, grad_mean, x, weight, bias, at, fused)
    return _convolve(x, weight, fused, bias=bias, grad=grad, grad_mean=grad_mean)[0]


def grad_input(dy: Tensor, x: Tensor, weight: Tensor, at: Window, fused: Fused) -> Tensor:
    """The gradient `(B, H, W, C)` of `x`, from that of `grad_sum`."""
    turned = Fused(residual=fused.residual, act=fused.pre_act)
    return _convolve(dy, weight, turned, flip=True, point=x if fused.pre_act else None)[0]


def grad_weight(
    dy: Tensor, x: Tensor, weight: Tensor, at: Window, fused: Fused
) -> tuple[Tensor, Tensor]:
    """The gradients of `weight` and of the bias `(C,)`, from that of `grad_sum`."""
    maps = Maps(x.shape[3], dy, x)
    channels, kernel, cols = x.shape[3], at.size, 16
    strips, rows = split_map(x, cols), kernel_rows(kernel, x.dtype)
    groups = cdiv(kernel, rows)
    parts = split_blocks(x, strips.blocks * strips.down, groups)
    dweight = x.new_empty((parts, channels, kernel, kernel), dtype=torch.float32)
    dbias = x.new_empty((parts, channels), dtype=torch.float32)
    with torch.cuda.device_of(x):
        toeplitz_grad_weight_kernel[(cdiv(channels, BLOCK_C), parts, groups)](
            *maps.maps, dweight, dbias, *maps.strides, x.shape[1], x.shape[2], maps.channels,
            strips.across, strips.rows, strips.total, strips.down,
            K=kernel, ROWS=rows, COLS=cols, PRE_ACT=fused.pre_act, ALIGN=maps.align, **_options(x),
        )  # fmt: skip
    return dweight.sum(0).view_as(weight).to(weight.dtype), dbias.sum(0).to(dy.dtype)
