"""Depthwise convolution of a map and LayerNorm of the result, in one pass over the map.

The position encodings of most transformers here stand before a norm. With a map `x`:

    y = conv(x, w) + bias + x if residual
    n = (y - mean) * rstd * weight + bias           over the channels of each pixel

Backward, with `g` the gradient of `y`, `h` that of `n`, `hat = (y - mean) * rstd`:

    dy = g + rstd * (h * weight - avg(h * weight) - hat * avg(h * weight * hat))
    dweight = sum of h * hat        dbias = sum of h

and from `dy` on as in `depthwise_conv`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _depthwise_pytorch as pytorch
from . import depthwise_conv as _depthwise_conv  # noqa: F401  registers the backward op
from ._choice import implementation
from ._common import accumulation_dtype, outside_autocast, reference_in_use, runs_at_once
from ._depthwise import Fused, Window, cast_all, check_conv


def depthwise_conv_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute `depthwise_conv_norm` in plain, differentiable PyTorch."""
    at, fused = Window(weight.shape[-1]), Fused(residual)
    y = pytorch.convolve(x, weight, bias, None, at, fused)
    return y, torch.nn.functional.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps)


@torch.library.custom_op(
    "backbones::depthwise_conv_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "float eps, bool residual) -> (Tensor, Tensor, Tensor)",
)
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    at, fused = Window(weight.shape[-1]), Fused(residual)
    with outside_autocast(x):
        run = implementation("norm", x, at.size, 1)
        return run.forward_norm(x, weight, bias, norm_weight, norm_bias, eps, at, fused)


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    stats = x.new_empty((2, *x.shape[:3]), dtype=accumulation_dtype(x.dtype))
    return x.new_empty(x.shape), x.new_empty(x.shape), stats


@torch.library.custom_op(
    "backbones::depthwise_conv_norm_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor grad_normed, Tensor y, Tensor stats, Tensor? norm_weight, "
    "SymInt kernel) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    grad_normed: Tensor,
    y: Tensor,
    stats: Tensor,
    norm_weight: Tensor | None,
    kernel: int,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(y.device.type, enabled=False):
        run = implementation("norm_backward", y, kernel, 1)
        return run.norm_backward(grad, grad_normed, y, stats, norm_weight)


@_backward.register_fake
def _(
    grad: Tensor,
    grad_normed: Tensor,
    y: Tensor,
    stats: Tensor,
    norm_weight: Tensor | None,
    kernel: int,
) -> tuple[Tensor, Tensor, Tensor]:
    vector = y.shape[3:] if norm_weight is not None else (0,)
    return y.new_empty(y.shape), y.new_empty(vector), y.new_empty(vector)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, norm_weight, _, _, ctx.residual = inputs
    y, _, stats = output
    ctx.save_for_backward(x, weight, bias, norm_weight, y, stats)
    ctx.mark_non_differentiable(stats)


def _autograd(ctx, grad: Tensor, grad_normed: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    x, weight, bias, norm_weight, y, stats = ctx.saved_tensors
    need_x, need_weight, need_bias, need_norm_weight, need_norm_bias, *_ = ctx.needs_input_grad
    dy, dnorm_weight, dnorm_bias = _backward(
        grad, grad_normed, y, stats, norm_weight, weight.shape[-1]
    )
    dx = dweight = dbias = None
    if need_x or need_weight or need_bias:
        dx, dweight, dbias, _ = torch.ops.backbones.depthwise_conv_backward(
            dy, None, None, x, weight, bias, 1, False, ctx.residual, "", "",
            None, 0, 0, need_x, need_weight or need_bias,
        )  # fmt: skip
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        dnorm_weight if need_norm_weight else None,
        dnorm_bias if need_norm_bias else None,
        None,
        None,
    )


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _validate(x: Tensor, weight: Tensor, bias: Tensor | None, *norm: Tensor | None) -> None:
    check_conv(x, weight, bias, Window(weight.shape[-1]))
    for name, vector in zip(("norm_weight", "norm_bias"), norm, strict=True):
        if vector is not None and vector.shape != x.shape[3:]:
            raise ValueError(f"{name} {tuple(vector.shape)} must be a vector of C = {x.shape[3]}")
    if norm[0] is None and norm[1] is not None:
        raise ValueError("norm_bias without norm_weight: pass both, or neither")


def depthwise_conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: bool = False,
) -> tuple[Tensor, Tensor]:
    """Convolve every channel of a map with its own kernel, and normalise the pixels of the result.

    Args:
        x: Map `(B, H, W, C)`.
        weight: Kernels `(C, 1, K, K)`, K odd from 3 to 17, with `K // 2` zeros on every side.
        bias: Vector `(C,)`, or None.
        norm_weight: Weight of the LayerNorm `(C,)`, or None for one without.
        norm_bias: Bias of the LayerNorm `(C,)`, or None.
        eps: Added to the variances.
        residual: Add what is convolved.

    Returns:
        The result `(B, H, W, C)` and its LayerNorm over the channels, both contiguous and of the
        type of the result.

    Layout:
        As `depthwise_conv`.

    Numerics:
        As `depthwise_conv`. The norm reads the result as it is returned, rounded to its type. The
        backward pass needs `x`, the result, and two float32 numbers for each pixel.

    Gradients:
        As `depthwise_conv`.

    Raises:
        ValueError: Shapes or types that do not fit together.

    Source:
        LayerNorm, arXiv 1607.06450, section 3; before it as in DaViT, arXiv 2204.03645.
    """
    if torch.jit.is_scripting():
        y, normed, _ = torch.ops.backbones.depthwise_conv_norm(
            x, weight, bias, norm_weight, norm_bias, eps, residual
        )
        return y, normed
    else:
        return _dispatch(x, weight, bias, norm_weight, norm_bias, eps, residual)


def _dispatch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    if not isinstance(x, torch.fx.Proxy):
        x, weight, bias, norm_weight, norm_bias = cast_all(
            residual, x, weight, bias, norm_weight, norm_bias
        )
        # a trace sees sizes as tensors
        if not torch.jit.is_tracing():
            _validate(x, weight, bias, norm_weight, norm_bias)
        if reference_in_use():
            return depthwise_conv_norm_reference(
                x, weight, bias, norm_weight, norm_bias, eps, residual
            )
        if runs_at_once(x):
            at, fused = Window(weight.shape[-1]), Fused(residual)
            with outside_autocast(x):
                run = implementation("norm", x, at.size, 1)
                y, normed, _ = run.forward_norm(
                    x, weight, bias, norm_weight, norm_bias, eps, at, fused
                )
                return y, normed
    # through the packet, which torch.fx records; a call of the Python object it would not
    y, normed, _ = torch.ops.backbones.depthwise_conv_norm(
        x, weight, bias, norm_weight, norm_bias, eps, residual
    )
    return y, normed
