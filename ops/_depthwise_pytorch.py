"""Depthwise convolution of a map `(B, H, W, C)`, its surroundings and gradients, in plain PyTorch.

Of several formulations that compute the same, these are the fastest on a CPU
(`benchmarks/results/depthwise_cpu.json`). `triton/depthwise_conv.py` has functions of the same
names.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._activations import activate, activation_grad, gelu_tanh
from ._common import accumulation_dtype
from ._depthwise import Fused, Window

# kernels that oneDNN runs faster on planes, both copies included
_PLANES = (11, 13)


def _shift(at: Window, x: Tensor) -> tuple[int, int]:
    """Rows and columns by which `_pads` reaches further than the window does."""
    if not at.same:
        return 0, 0
    return 1 - x.shape[1] % 2, 1 - x.shape[2] % 2


def _pads(at: Window, x: Tensor) -> list[int]:
    # PyTorch pads both sides alike; one row too many is cheaper than a padded copy
    return [at.size // 2 + shift for shift in _shift(at, x)]


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, pads: list[int]) -> Tensor:
    channels = x.shape[3]
    x = x.permute(0, 3, 1, 2)
    if weight.shape[-1] in _PLANES and x.device.type == "cpu":
        x = x.contiguous()
    return F.conv2d(x, weight, bias, stride, pads, 1, channels).permute(0, 2, 3, 1)


def _fold(weight: Tensor, fused: Fused, x: Tensor) -> tuple[Tensor, bool]:
    """Add a residual to the middle taps where that is exact; whether one is left to add."""
    # in 16 bit a one beside small taps rounds them, and a GPU may take the map for TF32
    wide = accumulation_dtype(x.dtype) == x.dtype and x.device.type == "cpu"
    if not fused.residual or not wide:
        return weight, fused.residual
    middle, weight = weight.shape[-1] // 2, weight.clone()
    weight[..., middle, middle].add_(1)
    return weight, False


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None, at: Window, fused: Fused
) -> Tensor:
    """Compute all but the last activation and the mean, differentiably.

    Args:
        x: Map `(B, H, W, C)`.
        weight: Kernels `(C, 1, K, K)`.
        bias: Vector `(C,)`, or None.
        addend: Map `(B, H', W', C)`, or None.
        at: Where the kernels are put.
        fused: What surrounds the convolution.

    Returns:
        A map `(B, H', W', C)` of any strides.
    """
    rows, cols = _shift(at, x)
    x = activate(x, fused.pre_act)
    weight, residual = _fold(weight, fused, x)
    y = _conv(x, weight, bias, at.stride, _pads(at, x))
    if at.same:
        y = y[:, rows:, cols:]
    if residual:
        y = x + y
    return y if addend is None else y + addend


def average(y: Tensor, mean: str) -> Tensor:
    """Average `y` `(B, H, W, C)` over the map, `(B, C)`, or its squares for `mean="square"`.

    Squares of 16-bit types may leave their range: their average is float32.
    """
    dtype = accumulation_dtype(y.dtype)
    if mean == "square":
        return y.to(dtype).square().mean((1, 2))
    return y.mean((1, 2), dtype=dtype).to(y.dtype)


def add_square_grad(grad: Tensor, grad_mean: Tensor, y: Tensor) -> Tensor:
    """Add to the `grad` of `y` what comes through the average of its squares."""
    scale = grad_mean * (2 / (y.shape[1] * y.shape[2]))
    return torch.addcmul(grad, y, scale[:, None, None]).to(y.dtype)


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
    y = convolve(x, weight, bias, addend, at, fused)
    y = gelu_tanh(y, inplace=True) if fused.act == "gelu_tanh" else activate(y, fused.act)
    y = y.contiguous()
    return y, average(y, mean) if mean else y.new_empty(0)


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
    if grad_mean is not None:
        grad = grad + (grad_mean / (grad.shape[1] * grad.shape[2]))[:, None, None]
    if not fused.act:
        return grad
    return activation_grad(grad, convolve(x, weight, bias, None, at, fused), fused.act)


def grad_input(dy: Tensor, x: Tensor, weight: Tensor, at: Window, fused: Fused) -> Tensor:
    """The gradient `(B, H, W, C)` of `x`, from that of `grad_sum`."""
    weight, residual = _fold(weight, fused, x)
    if at.stride == 1:
        # the same convolution with its kernels turned around
        dt = _conv(dy, weight.flip(2, 3), None, 1, _pads(at, x))
    else:
        dt = _conv_backward(dy, x, weight, at, True)[0].permute(0, 2, 3, 1)
    if residual:
        dt = dt + dy
    return activation_grad(dt, x, fused.pre_act).contiguous()


def grad_weight(
    dy: Tensor, x: Tensor, weight: Tensor, at: Window, fused: Fused
) -> tuple[Tensor, Tensor]:
    """The gradients of `weight` and of the bias `(C,)`, from that of `grad_sum`."""
    dw = _conv_backward(dy, activate(x, fused.pre_act), weight, at, False)[1]
    dbias = dy.sum((0, 1, 2), dtype=accumulation_dtype(dy.dtype)).to(dy.dtype)
    return dw.contiguous(), dbias


def _conv_backward(
    dy: Tensor, t: Tensor, weight: Tensor, at: Window, of_input: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = _shift(at, t)
    if rows + cols > 0:
        dy = F.pad(dy, (0, 0, cols, 0, rows, 0))
    # autograd does not reach into registered ops
    return torch.ops.aten.convolution_backward(
        dy.permute(0, 3, 1, 2), t.permute(0, 3, 1, 2), weight, None,
        [at.stride] * 2, _pads(at, t), [1, 1], False, [0, 0], t.shape[3],
        [of_input, not of_input, False],
    )  # fmt: skip


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
    """Compute the result, its LayerNorm, and means and inverse deviations `(2, B, H, W)`."""
    y = convolve(x, weight, bias, None, at, fused).contiguous()
    if norm_bias is None and not y.is_cuda:
        # PyTorch's kernel for a CPU is slower without a bias
        norm_bias = y.new_zeros(y.shape[-1])
    wide, weight_wide, bias_wide = _wide(y, norm_weight, norm_bias)
    normed, *stats = torch.native_layer_norm(wide, y.shape[-1:], weight_wide, bias_wide, eps)
    return y, normed.to(y.dtype), torch.stack(stats).squeeze(-1)


def norm_backward(
    grad: Tensor, grad_normed: Tensor, y: Tensor, stats: Tensor, norm_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `y`, which `grad` reaches directly too, and of the norm's weight and bias.

    The latter are empty for a norm without weight.
    """
    mean, rstd = stats[..., None]
    g, wide, weight = _wide(grad_normed, y, norm_weight)
    affine = weight is not None
    dy, *vectors = torch.ops.aten.native_layer_norm_backward(
        g, wide, y.shape[-1:], mean, rstd, weight, weight, [True, affine, affine]
    )
    dweight, dbias = (v.to(y.dtype) if affine else y.new_empty(0) for v in vectors)
    return (grad + dy).to(y.dtype), dweight, dbias


def _wide(y: Tensor, *tensors: Tensor | None) -> list[Any]:
    """What a LayerNorm takes in the type of its sums; on a GPU it makes them so by itself."""
    dtype = y.dtype if y.is_cuda else accumulation_dtype(y.dtype)
    if dtype == y.dtype:
        return [y, *tensors]
    return [t if t is None else t.to(dtype) for t in (y, *tensors)]
