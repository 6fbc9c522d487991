"""Activations by name, and what they do to a gradient."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import runs_at_once

ACTIVATIONS = ("", "relu", "silu", "gelu", "gelu_tanh")

_aten = torch.ops.aten

# elements that `_in_blocks` takes at once: with what it holds they stay in cache
_BLOCK = 1 << 17


def gelu_tanh(x: Tensor, inplace: bool = False) -> Tensor:
    """GELU by tanh, in float32 on a CPU faster than PyTorch's where autograd does not record.

    Args:
        x: A tensor of any shape.
        inplace: Whether `x` may be overwritten.
    """
    if torch.jit.is_scripting():
        return F.gelu(x, approximate="tanh")
    else:
        if not runs_at_once(x) or x.dtype != torch.float32:
            return F.gelu(x, approximate="tanh")
        # channels-last maps are contiguous as `(B, H, W, C)`
        flat = x.permute(0, 2, 3, 1) if x.ndim == 4 and not x.is_contiguous() else x
        if not flat.is_contiguous():
            return F.gelu(x, approximate="tanh")
        out = flat if inplace else torch.empty_like(flat)
        _in_blocks(flat.view(-1), out.view(-1), inplace)
        return out if flat is x else out.permute(0, 3, 1, 2)


def _in_blocks(x: Tensor, out: Tensor, same: bool) -> None:
    # 0.5 * (1 + tanh(u)) = sigmoid(2 * u); PyTorch's own kernel is bound by its tanh
    for values, result in zip(x.split(_BLOCK), out.split(_BLOCK), strict=True):
        gate = values.pow(3).mul_(0.044715).add_(values).mul_(math.sqrt(8 / math.pi)).sigmoid_()
        if not same:
            result.copy_(values)
        result.mul_(gate)


def activate(x: Tensor, act: str) -> Tensor:
    """Apply the activation `act`, one of `ACTIVATIONS`; "" returns `x` itself."""
    if act == "relu":
        return F.relu(x)
    if act == "silu":
        return F.silu(x)
    if act == "gelu":
        return F.gelu(x)
    return gelu_tanh(x) if act == "gelu_tanh" else x


def activation_grad(grad: Tensor, x: Tensor, act: str) -> Tensor:
    """The gradient of `x`, from the `grad` of `activate(x, act)`; "" returns `grad` itself."""
    # autograd does not reach into registered ops
    if act == "relu":
        return _aten.threshold_backward(grad, x, 0)
    if act == "silu":
        return _aten.silu_backward(grad, x)
    if act == "gelu":
        return _aten.gelu_backward(grad, x)
    return _aten.gelu_backward(grad, x, approximate="tanh") if act == "gelu_tanh" else grad
