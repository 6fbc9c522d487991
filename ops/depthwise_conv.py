"""Depthwise convolution of a map, with what stands before and behind it.

Every channel has a kernel of its own, so a convolution moves far more bytes than it computes, and
each activation, addition or mean around it costs as much again. With a map `x` and kernels `w`:

    t = pre_act(x)
    y = act(conv(t, w) + bias + t if residual + addend)
    mean = average of y, or of its squares, over the map: for squeeze-excite and response norms

Beyond the edges of the map are zeros, after a border of one vector below and to the right if there
is one: where a network has padded a map before the projection that made it, the padding is not
zero any more.

Backward, with `g` the gradient of `y`; what the last activation took is computed anew:

    g += dmean / (H' W'), times 2 y of squares
    dy = g * act'       daddend = dy
    dt = conv(dy, w turned around) + dy if residual, dx = dt * pre_act'(x)
    dw = sum of t times dy, tap by tap      dbias = sum of dy
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _depthwise_pytorch as pytorch
from ._activations import ACTIVATIONS, activate
from ._choice import implementation
from ._common import accumulation_dtype, outside_autocast, reference_in_use, runs_at_once
from ._depthwise import Border, Fused, Window, cast_all, check_border, check_conv


def depthwise_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    stride: int = 1,
    same: bool = False,
    residual: bool = False,
    pre_act: str = "",
    act: str = "",
    border: Tensor | None = None,
    border_size: tuple[int, int] = (0, 0),
) -> Tensor:
    """Compute `depthwise_conv` in plain, differentiable PyTorch."""
    at, fused = Window(weight.shape[-1], stride, same), Fused(residual, pre_act, act)
    if border is None:
        return activate(pytorch.convolve(x, weight, bias, addend, at, fused), act)
    edge = Border(*border_size)
    y = pytorch.convolve(edge.extend(x, border), weight, bias, None, at, fused)
    y = edge.crop(activate(y, act))
    return y if addend is None else y + addend


def depthwise_conv_mean_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    same: bool = False,
    act: str = "",
    residual: bool = False,
    pre_act: str = "",
    square: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute `depthwise_conv_mean` in plain, differentiable PyTorch."""
    y = depthwise_conv_reference(x, weight, bias, None, stride, same, residual, pre_act, act)
    return y, pytorch.average(y, "square" if square else "mean")


def _compute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    stride: int,
    same: bool,
    residual: bool,
    pre_act: str,
    act: str,
    mean: str,
    border: Tensor | None,
    bottom: int,
    right: int,
) -> tuple[Tensor, Tensor]:
    at, fused = Window(weight.shape[-1], stride, same), Fused(residual, pre_act, act)
    edge = Border(bottom, right)
    with outside_autocast(x):
        run = implementation("forward", x, at.size, stride)
        if border is None or not any(edge):
            return run.forward(x, weight, bias, addend, at, fused, mean)
        y, _ = run.forward(edge.extend(x, border), weight, bias, None, at, fused, "")
        y = edge.crop(y)
        return y.contiguous() if addend is None else y + addend, x.new_empty(0)


_forward = torch.library.custom_op(
    "backbones::depthwise_conv",
    _compute,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? addend, SymInt stride, bool same, "
    "bool residual, str pre_act, str act, str mean, Tensor? border, SymInt bottom, SymInt right) "
    "-> (Tensor, Tensor)",
)


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    stride: int,
    same: bool,
    residual: bool,
    pre_act: str,
    act: str,
    mean: str,
    border: Tensor | None,
    bottom: int,
    right: int,
) -> tuple[Tensor, Tensor]:
    (batch, height, width, channels), at = x.shape, Window(weight.shape[-1], stride, same)
    out = x.new_empty((batch, at.out(height), at.out(width), channels))
    dtype = accumulation_dtype(x.dtype) if mean == "square" else x.dtype
    return out, x.new_empty((batch, channels) if mean else (0,), dtype=dtype)


@torch.library.custom_op(
    "backbones::depthwise_conv_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor? grad_mean, Tensor? y, Tensor x, Tensor weight, Tensor? bias, "
    "SymInt stride, bool same, bool residual, str pre_act, str act, Tensor? border, SymInt bottom, "
    "SymInt right, bool need_x, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    grad_mean: Tensor | None,
    y: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    same: bool,
    residual: bool,
    pre_act: str,
    act: str,
    border: Tensor | None,
    bottom: int,
    right: int,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    at, fused = Window(weight.shape[-1], stride, same), Fused(residual, pre_act, act)
    dx, dweight, dbias = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    edge = Border(bottom, right)
    if y is not None and grad_mean is not None:
        # the mean is that of squares
        grad, grad_mean = pytorch.add_square_grad(grad, grad_mean, y), None
    if border is not None:
        x, grad = edge.extend(x, border), edge.extend(grad, grad.new_zeros(grad.shape[3]))
    with torch.autocast(x.device.type, enabled=False):
        run = implementation("forward", x, at.size, stride)
        dy = run.grad_sum(grad, grad_mean, x, weight, bias, at, fused)
        if need_x:
            run = implementation("grad_input", x, at.size, stride)
            dx = run.grad_input(dy, x, weight, at, fused)
        if need_weight:
            run = implementation("grad_weight", x, at.size, stride)
            dweight, dbias = run.grad_weight(dy, x, weight, at, fused)
    if border is None or not need_x:
        return dx, dweight, dbias, x.new_empty(0 if border is None else border.shape)
    return edge.crop(dx).contiguous(), dweight, dbias, edge.sum(dx)


@_backward.register_fake
def _(
    grad: Tensor,
    grad_mean: Tensor | None,
    y: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    same: bool,
    residual: bool,
    pre_act: str,
    act: str,
    border: Tensor | None,
    bottom: int,
    right: int,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(weight.shape if need_weight else (0,)),
        x.new_empty((x.shape[3],) if need_weight else (0,)),
        x.new_empty((0,) if border is None else border.shape),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, _, *ctx.args, ctx.mean, border, bottom, right = inputs
    ctx.edge = bottom, right
    y = output[0] if ctx.mean == "square" else None
    ctx.save_for_backward(y, x, weight, bias, border)
    if not ctx.mean:
        ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad: Tensor, grad_mean: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    need_x, need_weight, need_bias, need_addend, *_, need_border, _, _ = ctx.needs_input_grad
    *tensors, border = ctx.saved_tensors
    dx, dweight, dbias, dborder = _backward(
        grad, grad_mean if ctx.mean else None, *tensors, *ctx.args, border, *ctx.edge,
        need_x or need_border, need_weight or need_bias,
    )  # fmt: skip
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        grad if need_addend else None,
        *[None] * 6,
        dborder if need_border else None,
        *[None] * 2,
    )


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _validate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    at: Window,
    fused: Fused,
) -> None:
    check_conv(x, weight, bias, at)
    for act in fused[1:]:
        if act not in ACTIVATIONS:
            raise ValueError(f"activation {act!r} is none of {ACTIVATIONS}")
    if fused.residual and at.stride != 1:
        raise ValueError(f"residual needs stride 1, not {at.stride}: the maps differ in size")
    if addend is None:
        return
    if fused.act:
        raise ValueError(f"act={fused.act!r} and an addend: apply one of them outside")
    size = (x.shape[0], at.out(x.shape[1]), at.out(x.shape[2]), x.shape[3])
    if addend.shape != size:
        raise ValueError(f"addend {tuple(addend.shape)} must have the shape {size} of the result")


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    stride: int = 1,
    same: bool = False,
    residual: bool = False,
    pre_act: str = "",
    act: str = "",
    border: Tensor | None = None,
    border_size: tuple[int, int] = (0, 0),
) -> Tensor:
    """Convolve every channel of a map with its own kernel, fused with what surrounds it.

    Args:
        x: Map `(B, H, W, C)`.
        weight: Kernels `(C, 1, K, K)`, K odd from 3 to 17.
        bias: Vector `(C,)`, or None.
        addend: Map `(B, H', W', C)` to add to the result, or None.
        stride: 1, or 2 for kernels of 3.
        same: With stride 2, pad as TensorFlow's "same" does: an even number of rows or columns gets
            zeros behind its last only. Else there are `K // 2` zeros on every side.
        residual: Add what is convolved.
        pre_act: Activation before: "relu", "silu", "gelu", "gelu_tanh", or "" for none.
        act: Activation behind, after residual and addend.
        border: Vector `(C,)` with which the map goes on below and to the right, before the zeros;
            with stride 1 only.
        border_size: Rows and columns that have it.

    Returns:
        The map `(B, H', W', C)`, contiguous, `H' = ceil(H / stride)`.

    Layout:
        All strides are free; the kernels copy only if those of the channels are not one.

    Numerics:
        float32, bfloat16 or float16, summed in float32. Where `depthwise_table.json` says that they
        are faster, Triton kernels compute on a GPU; else, in float64 and on a CPU, PyTorch. Under
        autocast all is cast to its type, with `residual` to that of `x`: a residual stream in
        float32 stays so.

    Gradients:
        For all tensors, once differentiable, deterministic by our kernels and as PyTorch's are by
        its own. Nothing but `x` is kept: activations are computed anew.

    Raises:
        ValueError: Shapes, types or options that do not fit together.

    Source:
        The position encodings of CPVT (arXiv 2102.10882, section 3.2), the local enhancement of
        BiFormer (arXiv 2303.08810, section 3.3), the large kernels of OverLoCK (arXiv 2502.20087).
    """
    if torch.jit.is_scripting():
        return torch.ops.backbones.depthwise_conv(
            x, weight, bias, addend, stride, same, residual, pre_act, act, "",
            border, border_size[0], border_size[1],
        )[0]  # fmt: skip
    else:
        return _dispatch(
            x,
            weight,
            bias,
            addend,
            stride,
            same,
            residual,
            pre_act,
            act,
            "",
            border,
            border_size,
        )[0]


def depthwise_conv_mean(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    same: bool = False,
    act: str = "",
    residual: bool = False,
    pre_act: str = "",
    square: bool = False,
) -> tuple[Tensor, Tensor]:
    """Convolve as `depthwise_conv` does, and average the result, or its squares, over the map.

    Args:
        x: Map `(B, H, W, C)`.
        weight: Kernels `(C, 1, K, K)`.
        bias: Vector `(C,)`, or None.
        stride: As in `depthwise_conv`, like the three that follow.
        same: Padding.
        act: Activation behind.
        residual: Add what is convolved.
        pre_act: Activation before.
        square: Average squares, for a global response norm; else values, for squeeze-excite.

    Returns:
        The map `(B, H', W', C)` and its average over the map `(B, C)`: of values in the type of the
        map, of squares in float32 for 16-bit types, whose range squares may leave. These keep the
        result for the backward pass.

    Raises:
        ValueError: As `depthwise_conv`.

    Source:
        Squeeze-and-excitation, arXiv 1709.01507, section 3.1; global response normalisation,
        arXiv 2301.00808, section 3.2.
    """
    mean = "square" if square else "mean"
    if torch.jit.is_scripting():
        return torch.ops.backbones.depthwise_conv(
            x, weight, bias, None, stride, same, residual, pre_act, act, mean, None, 0, 0
        )
    else:
        return _dispatch(x, weight, bias, None, stride, same, residual, pre_act, act, mean)


def _dispatch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    stride: int,
    same: bool,
    residual: bool,
    pre_act: str,
    act: str,
    mean: str,
    border: Tensor | None = None,
    border_size: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor]:
    if not isinstance(x, torch.fx.Proxy):
        x, weight, bias, addend, border = cast_all(residual, x, weight, bias, addend, border)
        at, fused = Window(weight.shape[-1], stride, same), Fused(residual, pre_act, act)
        # a trace sees sizes as tensors
        if not torch.jit.is_tracing():
            _validate(x, weight, bias, addend, at, fused)
            check_border(x, at, border, border_size)
        if reference_in_use():
            y = depthwise_conv_reference(
                x, weight, bias, addend, stride, same, residual, pre_act, act, border, border_size
            )
            return y, pytorch.average(y, mean) if mean else y
    args = (x, weight, bias, addend, stride, same, residual, pre_act, act, mean)
    if not isinstance(x, torch.fx.Proxy) and runs_at_once(x):
        return _compute(*args, border, *border_size)
    # through the packet, which torch.fx records; a call of the Python object it would not
    return torch.ops.backbones.depthwise_conv(*args, border, *border_size)
