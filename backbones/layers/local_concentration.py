"""Two large depthwise convolutions that sharpen linear attention (L2ViT, arXiv 2501.16182)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from timm.layers import is_exportable
from torch import Tensor, nn

from backbones.ops import depthwise_conv, depthwise_conv_reference

from .fold import batch_norm_affine

_KERNEL = 7


class FixedNorm(nn.Module):
    """What a BatchNorm does with its running statistics: a scale and a shift of every channel.

    Args:
        scale: Vector `(C,)`.
        shift: Vector `(C,)`.
    """

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(scale), nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, C, H, W)`."""
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])


@torch.fx.wrap
def _convolve_onto(
    addend: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, like: Tensor
) -> Tensor:
    """Convolve `x` and add the result to `addend`, in one op where that keeps the type.

    Under autocast the residual stream may be float32, while `like`, which a convolution has made,
    is of the type that the op would return.
    """
    if addend.dtype != like.dtype:
        return addend + depthwise_conv(x, weight, bias)
    return depthwise_conv(x, weight, bias, addend)


class LocalConcentration(nn.Module):
    """The local concentration module of L2ViT: two depthwise 7x7 convolutions of a map.

    After the first come GELU and a BatchNorm. The second pads the *normed* map with zeros, so the
    norm cannot become part of its weights: near the edges its shift is not there. `fuse()` makes a
    fixed scale and shift of it, for the same cost.

    Statistics and the second convolution's gradient need their maps: training keeps the input and
    those before and after the norm, but not that before GELU.

    Args:
        dim: Channels.
        device: Where parameters are made.
        dtype: Their type.

    Example:
        >>> LocalConcentration(64)(torch.randn(2, 25, 38, 64)).shape
        torch.Size([2, 25, 38, 64])
    """

    __constants__ = ("exportable",)

    # torch.jit.script stumbles over annotations of a module class
    if TYPE_CHECKING:
        bn: nn.Module

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.exportable = is_exportable()
        self.conv1 = nn.Conv2d(dim, dim, _KERNEL, padding=_KERNEL // 2, groups=dim, **dd)
        self.bn = nn.BatchNorm2d(dim, **dd)
        self.conv2 = nn.Conv2d(dim, dim, _KERNEL, padding=_KERNEL // 2, groups=dim, **dd)

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """Concentrate a map.

        Args:
            x: Map `(B, H, W, dim)`.
            addend: Map `(B, H, W, dim)` to add to the result, or None.

        Returns:
            A map `(B, H, W, dim)`.
        """
        if self.exportable:
            x = depthwise_conv_reference(x, self.conv1.weight, self.conv1.bias, act="gelu")
        else:
            x = depthwise_conv(x, self.conv1.weight, self.conv1.bias, act="gelu")
        y = self.bn(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        weight, bias = self.conv2.weight, self.conv2.bias
        if self.exportable:
            return depthwise_conv_reference(y, weight, bias, addend)
        if addend is None:
            return depthwise_conv(y, weight, bias)
        return _convolve_onto(addend, y, weight, bias, x)

    @torch.no_grad()
    def fuse(self) -> LocalConcentration:
        """Fix the statistics of the norm; return the layer."""
        if isinstance(self.bn, nn.BatchNorm2d):
            self.bn = FixedNorm(*batch_norm_affine(self.bn)).train(self.training)
        return self
