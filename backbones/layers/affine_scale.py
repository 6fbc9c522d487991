"""A layer scale with a bias (OverLoCK, arXiv 2502.20087)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class AffineScale(nn.Module):
    """Scale and shift the channels of a map, and add another map.

    Args:
        dim: Channels.
        init_value: First value of the scales; the bias starts at 0.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self, dim: int, init_value: float = 1.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.full((dim,), init_value, **dd))
        self.bias = nn.Parameter(torch.zeros(dim, **dd))

    def forward(self, x: Tensor, addend: Tensor) -> Tensor:
        """Take a map `(B, H, W, dim)`, return `weight * x + bias + addend`."""
        if self.bias is not None:
            addend = addend + self.bias
        return torch.addcmul(addend, x, self.weight)

    @torch.no_grad()
    def fold_bias(self, layer: nn.Linear) -> None:
        """Move the bias to the linear layer whose output is the addend."""
        if self.bias is not None:
            assert layer.bias is not None
            layer.bias.add_(self.bias)
            self.register_parameter("bias", None)
