"""Launch of the depthwise convolution kernels: tiles, programs, outputs.

The functions are those of `.._depthwise_pytorch`, with the same arguments and results.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _depthwise_pytorch as pytorch
from .._choice import MATRICES
from .._depthwise import Fused, Window
from . import _depthwise_kernels as rows_kernels
from . import _depthwise_norm_kernels as norm_kernels
from . import _depthwise_weight_kernels as weight_kernels
from . import _toeplitz as toeplitz
from ._depthwise_tiles import (
    Grid,
    Maps,
    norm_tile,
    parts_of,
    pixels_tile,
    programs_of,
    resident_of,
    strips_tile,
    weight_tile,
)
from ._launch import cdiv, multiprocessors

# programs per multiprocessor that normalise
_NORMS = 8
# most channels of a pixel that a program normalises
_MOST_CHANNELS = 2048


def _taps(weight: Tensor) -> Tensor:
    # (K * K, C), which programs load without gaps
    return weight.flatten(1).t().contiguous()


def _vector(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _pads(at: Window, x: Tensor) -> tuple[int, int]:
    return at.pad(x.shape[1]), at.pad(x.shape[2])


def _out_size(at: Window, x: Tensor) -> tuple[int, int]:
    return at.out(x.shape[1]), at.out(x.shape[2])


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    shift: Tensor | None,
    at: Window,
    fused: Fused,
    job: str,
    mean: str = "",
    flip: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Launch a convolution; see `_strips.emit_row` for `job`, `other` and `shift`.

    Returns:
        The map, and with `mean` sums of strips `(B, strips, C)` in float32, of values or of
        squares, else None.
    """
    (batch, height, width, channels), (out_h, out_w) = x.shape, _out_size(at, x)
    tile, enough = strips_tile(at.size, channels, fused.pre_act), programs_of(at.size)
    grid = Grid((out_h, out_w), channels, batch, tile, enough * multiprocessors(x))
    maps = Maps(channels, x, other)
    out = x.new_empty((batch, out_h, out_w, channels))
    shape = (batch, grid.chunks * grid.strips, channels)
    sums = x.new_empty(shape, dtype=torch.float32) if mean else None
    tensors = (maps.maps[0], _taps(weight), _vector(bias), maps.maps[1], shift, out, sums)
    constants = {
        "K": at.size, "PRE_ACT": fused.pre_act, "JOB": job, "ACT": fused.act, "SUM": mean,
        "ALIGN": maps.align, **grid.tile.constants,
    }  # fmt: skip
    with torch.cuda.device_of(x):
        if at.stride == 1:
            rows_kernels.depthwise_rows_kernel[grid.programs](
                *tensors, *maps.strides, height, width, maps.channels, *grid.sizes,
                FLIP=flip, RESIDUAL=fused.residual, **constants,
            )  # fmt: skip
        else:
            rows_kernels.depthwise_stride_kernel[grid.programs](
                *tensors, *maps.strides, height, width, out_h, out_w, maps.channels,
                *_pads(at, x), *grid.sizes, STRIDE=at.stride, **constants,
            )  # fmt: skip
    return out, sums


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    at: Window,
    fused: Fused,
    mean: str,
) -> tuple[Tensor, Tensor]:
    """Compute the result `(B, H', W', C)`, and what `average` makes of it; nothing for ""."""
    if at.size >= MATRICES:
        return toeplitz.forward(x, weight, bias, addend, at, fused, mean)
    job = "result" if addend is None else "add"
    y, sums = _convolve(x, weight, bias, addend, None, at, fused, job, mean)
    if sums is None:
        return y, y.new_empty(0)
    means = sums.sum(1) / (y.shape[1] * y.shape[2])
    return y, means if mean == "square" else means.to(y.dtype)


def grad_sum(
    grad: Tensor,
    grad_mean: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    at: Window,
    fused: Fused,
) -> Tensor:
    """The gradient `(B, H', W', C)` of what the last activation takes; `grad` itself without."""
    if not fused.act:
        return pytorch.grad_sum(grad, grad_mean, x, weight, bias, at, fused)
    if at.size >= MATRICES:
        return toeplitz.grad_sum(grad, grad_mean, x, weight, bias, at, fused)
    shift = None
    if grad_mean is not None:
        shift = grad_mean.float() / (grad.shape[1] * grad.shape[2])
    return _convolve(x, weight, bias, grad, shift, at, fused, "grad_sum")[0]


def grad_input(dy: Tensor, x: Tensor, weight: Tensor, at: Window, fused: Fused) -> Tensor:
    """The gradient `(B, H, W, C)` of `x`, from that of `grad_sum`."""
    if at.size >= MATRICES:
        return toeplitz.grad_input(dy, x, weight, at, fused)
    job, taken = ("grad_input", x) if fused.pre_act else ("result", None)
    if at.stride == 1:
        turned = Fused(fused.residual, "", fused.pre_act)
        return _convolve(dy, weight, None, taken, None, at, turned, job, flip=True)[0]
    return _strided_grad(dy, x, weight, at, fused.pre_act, job, taken)


def _strided_grad(
    dy: Tensor, x: Tensor, weight: Tensor, at: Window, act: str, job: str, taken: Tensor | None
) -> Tensor:
    (batch, height, width, channels), pads = x.shape, _pads(at, x)
    pairs = (height + pads[0] + 1) // 2, (width + pads[1] + 1) // 2
    tile, enough = replace(strips_tile(at.size, channels), span=2), programs_of(at.size)
    grid = Grid(pairs, channels, batch, tile, enough * multiprocessors(x))
    maps = Maps(channels, dy, taken)
    out = x.new_empty(x.shape)
    with torch.cuda.device_of(x):
        rows_kernels.depthwise_stride_grad_kernel[grid.programs](
            maps.maps[0], _taps(weight), maps.maps[1], out, *maps.strides,
            height, width, *dy.shape[1:3], maps.channels, *pads, *grid.sizes,
            JOB=job, ACT=act, ALIGN=maps.align, **grid.tile.constants,
        )  # fmt: skip
    return out


def grad_weight(
    dy: Tensor, x: Tensor, weight: Tensor, at: Window, fused: Fused
) -> tuple[Tensor, Tensor]:
    """The gradients of `weight` and of the bias `(C,)`, from that of `grad_sum`."""
    if at.size >= MATRICES:
        return toeplitz.grad_weight(dy, x, weight, at, fused)
    (batch, out_h, out_w, channels), taps = dy.shape, at.size * at.size
    tile, enough = weight_tile(at.size, channels, fused.pre_act), resident_of(at.size)
    enough *= multiprocessors(x)
    grid = Grid((out_h, out_w), channels, batch, tile, enough)
    parts = parts_of(grid.items, cdiv(enough, grid.channel_blocks))
    maps = Maps(channels, dy, x)
    partial = x.new_empty((parts, taps + 1, channels), dtype=torch.float32)
    programs, sizes, items = (parts, grid.channel_blocks), x.shape[1:3], (*grid.sizes, grid.items)
    constants = {
        "K": at.size, "PRE_ACT": fused.pre_act, "ALIGN": maps.align, **grid.tile.constants,
    }  # fmt: skip
    with torch.cuda.device_of(x):
        if at.stride == 1:
            weight_kernels.depthwise_weight_kernel[programs](
                *maps.maps, partial, *maps.strides, *sizes, maps.channels, *items, **constants,
            )  # fmt: skip
        else:
            weight_kernels.depthwise_stride_weight_kernel[programs](
                *maps.maps, partial, *maps.strides, *sizes, out_h, out_w, maps.channels,
                *_pads(at, x), *items, STRIDE=at.stride, **constants,
            )  # fmt: skip
    sums = partial.sum(0).to(weight.dtype)
    return sums[:taps].t().reshape(weight.shape).contiguous(), sums[taps].clone()


def forward_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    at: Window,
    fused: Fused,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the result, its LayerNorm, and means and inverse deviations `(2, B, H, W)`.

    In one pass for the kernels of 3 and up to 2048 channels that models have; else the norm, which
    is PyTorch's, is another.
    """
    batch, height, width, channels = x.shape
    stats = x.new_empty((2, batch, height, width), dtype=torch.float32)
    if at.size != 3 or channels > _MOST_CHANNELS:
        y = forward(x, weight, bias, None, at, fused, "")[0]
        variance, mean = torch.var_mean(y.float(), dim=-1, correction=0)
        torch.stack([mean, (variance + eps).rsqrt()], out=stats)
        return y, F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps), stats
    enough = programs_of(at.size) * multiprocessors(x)
    grid = Grid((height, width), channels, batch, norm_tile(channels), enough)
    vectors = [_vector(vector) for vector in (bias, norm_weight, norm_bias)]
    maps = Maps(channels, x)
    y, normed = x.new_empty(x.shape), x.new_empty(x.shape)
    with torch.cuda.device_of(x):
        norm_kernels.depthwise_norm_kernel[grid.items,](
            maps.maps[0], _taps(weight), *vectors, y, normed, stats,
            *maps.strides, height, width, maps.channels, *grid.sizes, stats[0].numel(), eps,
            K=at.size, RESIDUAL=fused.residual, ALIGN=maps.align, **grid.tile.constants,
        )  # fmt: skip
    return y, normed, stats


def norm_backward(
    grad: Tensor, grad_normed: Tensor, y: Tensor, stats: Tensor, norm_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `y`, which `grad` reaches directly too, and of the norm's weight and bias.

    The latter are empty for a norm without weight.
    """
    batch, height, width, channels = y.shape
    block_n, block_c, warps = pixels_tile(channels, y.dtype == torch.float32)
    pixels = batch * height * width
    parts = parts_of(cdiv(pixels, block_n), _NORMS * multiprocessors(y))
    maps = Maps(channels, grad, grad_normed)
    dy = y.new_empty(y.shape)
    partial = None
    if norm_weight is not None:
        partial = y.new_empty((parts, 2, channels), dtype=torch.float32)
    with torch.cuda.device_of(y):
        norm_kernels.norm_backward_kernel[parts,](
            *maps.maps, y, stats, _vector(norm_weight), dy, partial, *maps.strides,
            height, width, maps.channels, pixels, ALIGN=maps.align, BLOCK_N=block_n,
            BLOCK_C=block_c, num_warps=warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    if partial is None:
        return dy, y.new_empty(0), y.new_empty(0)
    dweight, dbias = partial.sum(0).to(y.dtype)
    return dy, dweight.clone(), dbias.clone()
