"""Averages of a map over a grid of regions that cover it, as an op of its own.

PyTorch computes them, forward and backward. But the code that `torch.compile` makes of PyTorch's
pooling holds for one size of region: every new size of image would be compiled anew.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import reference_in_use


def adaptive_average_reference(x: Tensor, rows: int, cols: int) -> Tensor:
    """Compute `adaptive_average` in plain, differentiable PyTorch."""
    return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), (rows, cols)).permute(0, 2, 3, 1)


@torch.library.custom_op(
    "backbones::adaptive_average",
    mutates_args=(),
    schema="(Tensor x, SymInt rows, SymInt cols) -> Tensor",
)
def _average(x: Tensor, rows: int, cols: int) -> Tensor:
    return adaptive_average_reference(x, rows, cols).contiguous()


@_average.register_fake
def _(x: Tensor, rows: int, cols: int) -> Tensor:
    return x.new_empty((x.shape[0], rows, cols, x.shape[3]))


@torch.library.custom_op(
    "backbones::adaptive_average_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x) -> Tensor",
)
def _average_backward(grad: Tensor, x: Tensor) -> Tensor:
    channels_first = grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)
    grad_x = torch.ops.aten._adaptive_avg_pool2d_backward(*channels_first)
    return grad_x.permute(0, 2, 3, 1).contiguous()


@_average_backward.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (x,) = ctx.saved_tensors
    return torch.ops.backbones.adaptive_average_backward(grad, x), None, None


_average.register_autograd(_autograd, setup_context=_setup_context)


def adaptive_average(x: Tensor, rows: int, cols: int) -> Tensor:
    """Average a map over regions, one for each pixel of a smaller or larger map.

    Region `i` of `rows` covers the rows from `floor(i * H / rows)` up to
    `ceil((i + 1) * H / rows)`, exclusive; likewise the columns.

    Args:
        x: Map `(B, H, W, C)`.
        rows: Rows of regions.
        cols: Columns of regions.

    Returns:
        The averages `(B, rows, cols, C)`, as `torch.nn.functional.adaptive_avg_pool2d` computes
        them, gradients too.

    Layout:
        All strides are free.
    """
    if torch.jit.is_scripting():
        return torch.ops.backbones.adaptive_average(x, rows, cols)
    elif reference_in_use():
        return adaptive_average_reference(x, rows, cols)
    return torch.ops.backbones.adaptive_average(x, rows, cols)
