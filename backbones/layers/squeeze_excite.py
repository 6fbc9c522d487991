"""Squeeze-excite behind a depthwise convolution (arXiv 1709.01507)."""

from __future__ import annotations

import timm.layers
from torch import Tensor

from backbones.ops import depthwise_conv_mean


class SqueezeExcite(timm.layers.SqueezeExcite):
    """Timm's layer, which can also average while the convolution before it runs."""

    def forward_conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, same: bool, act: str
    ) -> Tensor:
        """Convolve depthwise, apply an activation, then scale channels as `forward` does.

        Args:
            x: Map `(B, C, H, W)`.
            weight: Kernels `(C, 1, 3, 3)`.
            bias: Vector `(C,)`, or None.
            stride: 1 or 2.
            same: Pad as TensorFlow's "same" does, with stride 2.
            act: Activation by name, see `ops.depthwise_conv`.

        Returns:
            A map `(B, C, ceil(H / stride), ceil(W / stride))`.
        """
        y, mean = depthwise_conv_mean(x.permute(0, 2, 3, 1), weight, bias, stride, same, act)
        hidden = self.act(self.bn(self.fc1(mean[:, :, None, None])))
        return y.permute(0, 3, 1, 2) * self.gate(self.fc2(hidden))
