"""Position encoding by a depthwise convolution of the map itself (CPVT, arXiv 2102.10882)."""

from __future__ import annotations

from typing import Any

from timm.layers import is_exportable
from torch import Tensor, nn

from backbones.ops import depthwise_conv_norm, depthwise_conv_norm_reference


class ConvPositionEncoding(nn.Module):
    """Add a depthwise 3x3 convolution of a map to the map, and normalise the sum.

    Args:
        dim: Channels.
        device: Where parameters are made.
        dtype: Their type.
    """

    __constants__ = ("exportable",)

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.exportable = is_exportable()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Encode positions in a map and compute the LayerNorm of the result, in one op.

        Args:
            x: Map `(B, H, W, dim)`.
            norm_weight: Weight of the LayerNorm `(dim,)`, or None.
            norm_bias: Bias of the LayerNorm `(dim,)`, or None.
            eps: Added to the variances.

        Returns:
            The map with positions, and its LayerNorm, both `(B, H, W, dim)`.
        """
        weight, bias = self.proj.weight, self.proj.bias
        if self.exportable:
            return depthwise_conv_norm_reference(x, weight, bias, norm_weight, norm_bias, eps, True)
        return depthwise_conv_norm(x, weight, bias, norm_weight, norm_bias, eps, True)
