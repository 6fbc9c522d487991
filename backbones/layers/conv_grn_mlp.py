"""A feed forward network with a depthwise convolution and a global response norm (OverLoCK)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .global_response_norm import GlobalResponseNorm


class ConvGrnMlp(nn.Module):
    """Two linear layers; between them GELU, a residual depthwise 3x3 convolution, and GRN.

    Args:
        dim: Width of the map.
        hidden: Width between the layers.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(self, dim: int, hidden: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.grn = GlobalResponseNorm(hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`."""
        x, conv = self.fc1(x), self.dwconv
        return self.fc2(self.grn.forward_conv(x, conv.weight, conv.bias, True, "gelu"))

    @torch.no_grad()
    def fuse(self) -> ConvGrnMlp:
        """Fold the shift of the response norm into the last layer; return the network."""
        self.grn.fold_bias(self.fc2)
        return self
