"""A slice of the channels of a map that is used whole too."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import Tensor

from backbones.ops import reference_in_use


class _Slice(torch.autograd.Function):
    """A tensor, and a slice of it whose gradient is added to that of the tensor in place."""

    @staticmethod
    def forward(x: Tensor, dim: int, start: int, length: int) -> tuple[Tensor, Tensor]:
        return x.view_as(x), x.narrow(dim, start, length)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.place = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, grad_slice = grads
        grad.narrow(*ctx.place).add_(grad_slice)
        return grad, None, None, None


def with_slice(x: Tensor, dim: int, start: int, length: int) -> tuple[Tensor, Tensor]:
    """Take a slice of a map beside the map, for less traffic in the backward pass.

    Autograd would pad the gradient of the slice with zeros and add two whole maps. Here it is added
    in place, so the map that is returned must go to one registered op alone: the gradients that
    these return are nobody else's.

    Args:
        x: Any tensor.
        dim: Dimension that is sliced.
        start: First index.
        length: How many.

    Returns:
        `x`, to be used in its place, and the slice.
    """
    if torch.jit.is_scripting():
        return x, x.narrow(dim, start, length)
    else:
        # graphs hold no functions of autograd, and compilers add gradients well by themselves
        graph = isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing()
        if graph or torch.compiler.is_compiling() or reference_in_use() or not x.requires_grad:
            return x, x.narrow(dim, start, length)
        slices: tuple[Tensor, Tensor] = _Slice.apply(x, dim, start, length)
        return slices
