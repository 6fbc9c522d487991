"""Global response normalisation behind a depthwise convolution (arXiv 2301.00808)."""

from __future__ import annotations

from typing import Any

import timm.layers.grn
import torch
from timm.layers import is_exportable
from torch import Tensor

from backbones.ops import depthwise_conv_mean, depthwise_conv_mean_reference


class GlobalResponseNorm(timm.layers.grn.GlobalResponseNorm):
    """Timm's layer, which can also take the norms of channels while the convolution before it runs.

    Args:
        dim: Channels of a map `(B, H, W, dim)`.
        device: Where parameters are made.
        dtype: Their type.
    """

    __constants__ = ("exportable",)

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, channels_last=True, device=device, dtype=dtype)
        self.exportable = is_exportable()

    def forward_conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, pre_act: str
    ) -> Tensor:
        """Convolve depthwise, then scale channels as `forward` does.

        Args:
            x: Map `(B, H, W, C)`.
            weight: Kernels `(C, 1, K, K)`.
            bias: Vector `(C,)`, or None.
            residual: Add what is convolved.
            pre_act: Activation before, see `ops.depthwise_conv`.

        Returns:
            A map `(B, H, W, C)`.
        """
        options = (1, False, "", residual, pre_act, True)
        if self.exportable:
            y, square = depthwise_conv_mean_reference(x, weight, bias, *options)
        else:
            y, square = depthwise_conv_mean(x, weight, bias, *options)
        # of channels that are zero everywhere a root has no gradient
        norms = (square * (y.shape[1] * y.shape[2])).clamp(min=1e-30).sqrt()
        ratio = norms / (norms.mean(1, keepdim=True) + self.eps)
        scale = 1 + self.weight * ratio
        return torch.addcmul(self.bias.to(y.dtype), y, scale.to(y.dtype)[:, None, None])
