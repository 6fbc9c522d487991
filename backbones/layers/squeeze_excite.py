"""Squeeze-excite behind a depthwise convolution (arXiv 1709.01507)."""

from __future__ import annotations

from typing import Any

import timm.layers
from timm.layers import is_exportable
from torch import Tensor, nn

from backbones.ops import depthwise_conv_mean, depthwise_conv_mean_reference


class SqueezeExcite(timm.layers.SqueezeExcite):
    """Timm's layer, which can also average while the convolution before it runs.

    Args:
        channels: Channels of a map `(B, channels, H, W)`.
        rd_ratio: Inner over outer width, rounded to a multiple of 8.
        rd_channels: Inner width; None for that of `rd_ratio`.
        act_layer: Activation inside, by name or class.
        device: Where parameters are made.
        dtype: Their type.
    """

    __constants__ = ("exportable",)

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        act_layer: str | type[nn.Module] = "relu",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            channels,
            rd_ratio,
            rd_channels,
            act_layer=act_layer,
            device=device,
            dtype=dtype,
        )
        self.exportable = is_exportable()

    def forward_conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: int,
        same: bool,
        act: str,
        pre_act: str,
    ) -> Tensor:
        """Convolve depthwise, apply an activation, then scale channels as `forward` does.

        Args:
            x: Map `(B, C, H, W)`.
            weight: Kernels `(C, 1, K, K)`.
            bias: Vector `(C,)`, or None.
            stride: 1, or 2 for kernels of 3.
            same: Pad as TensorFlow's "same" does, with stride 2.
            act: Activation behind the convolution by name, see `ops.depthwise_conv`.
            pre_act: Activation before it.

        Returns:
            A map `(B, C, ceil(H / stride), ceil(W / stride))`.
        """
        maps, options = x.permute(0, 2, 3, 1), (stride, same, act, False, pre_act)
        if self.exportable:
            y, mean = depthwise_conv_mean_reference(maps, weight, bias, *options)
        else:
            y, mean = depthwise_conv_mean(maps, weight, bias, *options)
        hidden = self.act(self.bn(self.fc1(mean[:, :, None, None])))
        return y.permute(0, 3, 1, 2) * self.gate(self.fc2(hidden))
