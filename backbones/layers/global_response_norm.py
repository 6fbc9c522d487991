"""Global response normalisation behind a depthwise convolution (arXiv 2301.00808)."""

from __future__ import annotations

from typing import Any

import timm.layers.grn
import torch
import torch.fx
from timm.layers import is_exportable
from torch import Tensor, nn

from backbones.ops import depthwise_conv_mean, depthwise_conv_mean_reference


# one call in a graph of torch.fx, which cannot ask for a device
@torch.fx.wrap
def channel_norms(x: Tensor) -> Tensor:
    """Norms `(B, C)` of the channels of a map `(B, H, W, C)`, in float32 for 16-bit types."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.device.type != "cpu":
        return torch.linalg.vector_norm(x, dim=(1, 2), dtype=dtype)
    # there the one pass of a norm is not vectorised
    return _root(x.to(dtype).square().sum((1, 2)))


def _root(square: Tensor) -> Tensor:
    # of channels that are zero everywhere a root has no gradient
    return square.clamp(min=1e-30).sqrt()


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

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`."""
        return self._scale(x, channel_norms(x))

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
        return self._scale(y, _root(square * (y.shape[1] * y.shape[2])))

    def _scale(self, x: Tensor, norms: Tensor) -> Tensor:
        ratio = norms / (norms.mean(1, keepdim=True) + self.eps)
        scale = (1 + self.weight * ratio).to(x.dtype)[:, None, None]
        return x * scale if self.bias is None else torch.addcmul(self.bias.to(x.dtype), x, scale)

    @torch.no_grad()
    def fold_bias(self, layer: nn.Linear) -> None:
        """Move the bias to the linear layer that reads the result."""
        if self.bias is not None:
            assert layer.bias is not None
            layer.bias.add_(layer.weight @ self.bias)
            self.register_parameter("bias", None)
