"""A feed forward network with a depthwise convolution inside (PVTv2, arXiv 2106.13797; RAVLT)."""

from __future__ import annotations

from typing import Any

from timm.layers import is_exportable
from torch import Tensor, nn

from backbones.ops import depthwise_conv, depthwise_conv_reference


class DepthwiseMlp(nn.Module):
    """Two linear layers; between them GELU, then a depthwise 3x3 convolution added to its input.

    Args:
        dim: Width of the map.
        hidden: Width between the layers.
        device: Where parameters are made.
        dtype: Their type.
    """

    __constants__ = ("exportable",)

    def __init__(self, dim: int, hidden: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.exportable = is_exportable()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`."""
        x, weight, bias = self.fc1(x), self.dwconv.weight, self.dwconv.bias
        if self.exportable:
            x = depthwise_conv_reference(x, weight, bias, residual=True, pre_act="gelu")
        else:
            x = depthwise_conv(x, weight, bias, residual=True, pre_act="gelu")
        return self.fc2(x)
