"""Position encoding by a depthwise convolution of the map itself (CPVT, arXiv 2102.10882)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ConvPositionEncoding(nn.Module):
    """Add a depthwise 3x3 convolution of a map to the map.

    Args:
        dim: Channels.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`."""
        # the addition is not folded into the kernel: in 16 bit a one beside small taps rounds them
        return x + self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
