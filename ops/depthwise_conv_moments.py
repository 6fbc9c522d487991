"""Mean and variance of depthwise convolutions of a map, for the norms behind them.

Large kernels may train as a sum of dilated convolutions, each with a BatchNorm behind it. With the
statistics of the batch these are affine, and the sum is one convolution: only the statistics need
the others. Each is computed and forgotten. With `z_i = conv(x, w_i)`, over batch and map:

    m_i = avg(z_i)        v_i = avg((z_i - m_i)^2)

Backward, `z_i` is computed anew, and n is the number of pixels:

    dz_i = (dm_i + 2 dv_i (z_i - m_i)) / n
    dx = sum of conv(dz_i, w_i turned around)        dw_i = sum of dz_i times x, tap by tap

`dz_i` is of the order of 1 / n, and `dw_i` sums n products: more than float16 can hold. So both are
computed from `dz_i / s_i`, with `s_i = sqrt(n) (|dm_i| + 2 |dv_i| sqrt(v_i)) / n` for each channel,
and multiplied by `s_i` in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _depthwise_dilated as dilated
from ._common import accumulation_dtype, autocast, reference_in_use
from ._depthwise import LARGEST, Window, check_conv
from ._depthwise_dilated import Dilated


def depthwise_conv_moments_reference(
    x: Tensor, weights: list[Tensor], dilations: list[int]
) -> tuple[Tensor, Tensor]:
    """Compute `depthwise_conv_moments` in plain, differentiable PyTorch."""
    pairs = []
    for weight, dilation in zip(weights, dilations, strict=True):
        z = _plain_conv(x.permute(0, 3, 1, 2), weight, dilation)
        wide = z.to(accumulation_dtype(z.dtype))
        pairs.append(torch.var_mean(wide, (0, 2, 3), correction=0))
    variances, means = zip(*pairs, strict=True)
    return torch.stack(means), torch.stack(variances)


def _plain_conv(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    options = (None, 1, dilation * (weight.shape[-1] // 2), dilation, x.shape[1])
    if x.device.type != "cpu":
        return F.conv2d(x, weight, *options)
    # in bfloat16 its gradients are wrong there, see `_depthwise_dilated.grad_weight`
    dtype = accumulation_dtype(x.dtype)
    with torch.autocast("cpu", enabled=False):
        return F.conv2d(x.to(dtype), weight.to(dtype), *options)


def _moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a map `(B, H, W, C)`, which may be overwritten."""
    wide, dims = z.to(accumulation_dtype(z.dtype)), (0, 1, 2)
    if wide.device.type != "cpu":
        variance, mean = torch.var_mean(wide, dims, correction=0)
        return mean, variance
    # there the one pass of var_mean is not vectorised
    mean = wide.mean(dims)
    return mean, wide.sub_(mean).square_().mean(dims)


def _places(weights: list[Tensor], dilations: list[int]) -> list[Dilated]:
    return [Dilated(w.shape[-1], r) for w, r in zip(weights, dilations, strict=True)]


@torch.library.custom_op(
    "backbones::depthwise_conv_moments",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, int[] dilations) -> (Tensor, Tensor)",
)
def _forward(x: Tensor, weights: list[Tensor], dilations: list[int]) -> tuple[Tensor, Tensor]:
    shape, dtype = (len(weights), x.shape[3]), accumulation_dtype(x.dtype)
    means, variances = x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)
    with torch.autocast(x.device.type, enabled=False):
        for n, at in enumerate(_places(weights, dilations)):
            means[n], variances[n] = _moments(dilated.forward(x, weights[n], at))
    return means, variances


@_forward.register_fake
def _(x: Tensor, weights: list[Tensor], dilations: list[int]) -> tuple[Tensor, Tensor]:
    shape, dtype = (len(weights), x.shape[3]), accumulation_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _scaled_grad(
    z: Tensor, grads: tuple[Tensor, Tensor], stats: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The gradient of `z` `(B, H, W, C)`, as a factor `(C,)` and what it is a multiple of.

    `z` may be overwritten.
    """
    (grad_mean, grad_variance), (mean, variance) = grads, stats
    count = z.shape[0] * z.shape[1] * z.shape[2]
    slope = 2 * grad_variance
    size = (grad_mean.abs() + slope.abs() * variance.sqrt()) * count**0.5
    # where nothing comes back nothing goes on
    size = torch.where(size > 0, size, 1)
    slope, shift = slope / size, grad_mean / size
    if z.dtype == mean.dtype:
        return size / count, z.sub_(mean).mul_(slope).add_(shift)
    # in one pass; what the difference loses in float32, z has lost many times over in 16 bit
    return size / count, torch.addcmul(shift - mean * slope, z, slope, out=z)


@torch.library.custom_op(
    "backbones::depthwise_conv_moments_backward",
    mutates_args=(),
    schema="(Tensor grad_mean, Tensor grad_variance, Tensor mean, Tensor variance, Tensor x, "
    "Tensor[] weights, int[] dilations, bool need_x, bool need_weight) -> (Tensor, Tensor[])",
)
def _backward(
    grad_mean: Tensor,
    grad_variance: Tensor,
    mean: Tensor,
    variance: Tensor,
    x: Tensor,
    weights: list[Tensor],
    dilations: list[int],
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, list[Tensor]]:
    dx = torch.zeros(x.shape if need_x else (0,), dtype=mean.dtype, device=x.device)
    dweights = [w.new_zeros(w.shape if need_weight else (0,)) for w in weights]
    if x.numel() == 0:
        return dx.to(x.dtype), dweights
    with torch.autocast(x.device.type, enabled=False):
        for n, at in enumerate(_places(weights, dilations)):
            z = dilated.forward(x, weights[n], at)
            stats = mean[n], variance[n]
            scale, dz = _scaled_grad(z, (grad_mean[n], grad_variance[n]), stats)
            del z
            if need_x:
                dx.addcmul_(scale, dilated.grad_input(dz, x, weights[n], at))
            if need_weight:
                dw = dilated.grad_weight(dz, x, weights[n], at)
                dweights[n].copy_(scale[:, None, None, None] * dw)
    return dx.to(x.dtype), dweights


@_backward.register_fake
def _(
    grad_mean: Tensor,
    grad_variance: Tensor,
    mean: Tensor,
    variance: Tensor,
    x: Tensor,
    weights: list[Tensor],
    dilations: list[int],
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, list[Tensor]]:
    dweights = [w.new_empty(w.shape if need_weight else (0,)) for w in weights]
    return x.new_empty(x.shape if need_x else (0,)), dweights


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weights, ctx.dilations = inputs
    ctx.save_for_backward(*output, x, *weights)


def _autograd(ctx, *grads: Tensor) -> tuple[object, ...]:  # type: ignore[no-untyped-def]
    need_x, need_weights, _ = ctx.needs_input_grad
    mean, variance, x, *weights = ctx.saved_tensors
    dx, dweights = _backward(
        *grads, mean, variance, x, weights, ctx.dilations, need_x, any(need_weights)
    )
    needed = zip(dweights, need_weights, strict=True)
    return dx if need_x else None, [dw if need else None for dw, need in needed], None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _validate(x: Tensor, weights: list[Tensor], dilations: list[int]) -> None:
    if not weights or len(weights) != len(dilations):
        counts = f"{len(weights)} weights and {len(dilations)} dilations"
        raise ValueError(f"{counts}: there must be as many of both, and one at least")
    for weight, dilation in zip(weights, dilations, strict=True):
        check_conv(x, weight, None, Window(weight.shape[-1]))
        reach = Dilated(weight.shape[-1], dilation).reach
        if dilation < 1 or reach > LARGEST:
            kernel = f"kernels of {weight.shape[-1]} with dilation {dilation}"
            raise ValueError(f"{kernel}: dilations are positive, and taps reach {LARGEST} pixels")


def depthwise_conv_moments(
    x: Tensor, weights: list[Tensor], dilations: list[int]
) -> tuple[Tensor, Tensor]:
    """Average depthwise convolutions of a map and their squared deviations, over batch and map.

    Args:
        x: Map `(B, H, W, C)`.
        weights: Kernels `(C, 1, k, k)` of n convolutions, k odd from 3 to 17.
        dilations: Distance of the taps of each; `dilation * (k - 1) + 1` is 17 at most.

    Returns:
        Mean and biased variance of every channel of every convolution, both `(n, C)`, with zeros
        around the map and one result per pixel.

    Layout:
        As `depthwise_conv`.

    Numerics:
        float32 for 16-bit types, whose convolutions are rounded to their type before. Of the
        convolutions one at a time is in memory; the backward pass keeps `x` and the kernels, and
        computes them anew. Under autocast `x` and the kernels are cast to its type.

    Gradients:
        For the map and the kernels, once differentiable.

    Raises:
        ValueError: Shapes or types that do not fit together.

    Source:
        The dilated branches of UniRepLKNet, arXiv 2311.15599, section 3.1; batch normalisation,
        arXiv 1502.03167, section 3.
    """
    if torch.jit.is_scripting():
        return torch.ops.backbones.depthwise_conv_moments(x, weights, dilations)
    else:
        return _dispatch(x, weights, dilations)


def _dispatch(x: Tensor, weights: list[Tensor], dilations: list[int]) -> tuple[Tensor, Tensor]:
    if not isinstance(x, torch.fx.Proxy):
        x, *weights = autocast(x, *weights)
        # a trace sees sizes as tensors
        if not torch.jit.is_tracing():
            _validate(x, weights, dilations)
        if reference_in_use():
            return depthwise_conv_moments_reference(x, weights, dilations)
    # through the packet, which torch.fx records; a call of the Python object it would not
    return torch.ops.backbones.depthwise_conv_moments(x, weights, dilations)
