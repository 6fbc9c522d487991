"""1x1 convolutions of maps with channels last."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution of a map `(B, H, W, C)`: a linear layer with the tensors of a convolution.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        bias: Add a bias.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(..., in_channels)`, return `(..., out_channels)`."""
        return F.linear(x, self.weight.flatten(1), self.bias)


def replace_linear(module: nn.Module) -> None:
    """Replace the linear layers within a module by pointwise convolutions with fresh weights.

    Args:
        module: Changed in place.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            weight, bias = child.weight, child.bias is not None
            dd = {"device": weight.device, "dtype": weight.dtype}
            conv = PointwiseConv2d(child.in_features, child.out_features, bias, **dd)
            setattr(module, name, conv)
        else:
            replace_linear(child)
