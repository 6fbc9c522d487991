"""Activations by name, and what they do to a gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("", "relu", "silu", "gelu", "gelu_tanh")

_aten = torch.ops.aten


def activate(x: Tensor, act: str) -> Tensor:
    """Apply the activation `act`, one of `ACTIVATIONS`; "" returns `x` itself."""
    if act == "relu":
        return F.relu(x)
    if act == "silu":
        return F.silu(x)
    if act == "gelu":
        return F.gelu(x)
    return F.gelu(x, approximate="tanh") if act == "gelu_tanh" else x


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
