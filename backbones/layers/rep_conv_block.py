"""The convolutional block of OverLoCK's base and overview networks (arXiv 2502.20087)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm
from torch import Tensor, nn

from .affine_scale import AffineScale
from .conv_grn_mlp import ConvGrnMlp
from .conv_norm import ConvNormAct
from .large_kernel import LargeKernelConv
from .position_conv import ConvPositionEncoding
from .squeeze_excite import SqueezeExcite
from .stage import ChannelsLastStage

_MLP_RATIO = 4


def squeeze_excite(dim: int, **dd: Any) -> SqueezeExcite:
    """Make OverLoCK's squeeze-excite.

    Args:
        dim: Channels.
        **dd: Device and type of the parameters.
    """
    return SqueezeExcite(dim, rd_channels=max(16, dim // 8), act_layer=nn.GELU, **dd)


class RepConvBlock(nn.Module):
    """A large depthwise kernel with squeeze-excite, and a feed forward network, on one residual.

    A depthwise 3x3 convolution is added to the map before. It computes the norm behind it, from the
    parameters of `norm`: this module is not called, nor are its hooks.

    Args:
        dim: Width of the map.
        kernel_size: Side of the large kernel.
        scale: Scale and shift the map that the residual is added to.
        drop_path: Probability that training drops the residual.
        reparam: Make the merged form of the large kernel.
        device: Where parameters are made.
        dtype: Their type.
    """

    __constants__ = ("fused",)

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        scale: bool,
        drop_path: float = 0.0,
        reparam: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fused = False
        self.cpe = ConvPositionEncoding(dim, **dd)
        self.norm = LayerNorm(dim, eps=1e-6, **dd)
        self.conv = LargeKernelConv(dim, kernel_size, reparam, **dd)
        self.se = squeeze_excite(dim, **dd)
        self.mlp = ConvGrnMlp(dim, _MLP_RATIO * dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.scale = AffineScale(dim, **dd) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`."""
        x, y = self.cpe(x, self.norm.weight, self.norm.bias, self.norm.eps)
        y = self.drop_path(self.mlp(self._convolve(y)))
        return x + y if self.scale is None else self.scale(x, y)

    def _convolve(self, x: Tensor) -> Tensor:
        """The large kernel and squeeze-excite."""
        if self.fused:
            conv, channels_first = self.conv.rep.conv, x.permute(0, 3, 1, 2)
            out = self.se.forward_conv(channels_first, conv.weight, conv.bias, 1, False, "", "")
        else:
            out = self.se(self.conv(x).permute(0, 3, 1, 2))
        return out.permute(0, 2, 3, 1)

    @torch.no_grad()
    def fuse(self) -> RepConvBlock:
        """Merge kernels and norms, average while the kernel runs; return the block."""
        self.conv.fuse()
        self.fused = True
        if self.scale is not None:
            self.scale.fold_bias(self.mlp.fc2)
        return self


def halve(in_dim: int, dim: int, **dd: Any) -> ConvNormAct:
    """Make a 3x3 convolution of stride 2, without bias, and its BatchNorm.

    Args:
        in_dim: Input channels.
        dim: Output channels.
        **dd: Device and type of the parameters.
    """
    return ConvNormAct(in_dim, dim, stride=2, act_layer=None, bias=False, **dd)


def rep_conv_stage(
    in_dim: int | None,
    dim: int,
    kernel_size: int,
    scale: bool,
    rates: Sequence[float],
    reparam: bool,
    **dd: Any,
) -> ChannelsLastStage:
    """Make a stage of blocks, on maps `(B, dim, H, W)`.

    Args:
        in_dim: Channels of the map before, which is halved; None to take it as it is.
        dim: Width of the map.
        kernel_size: As for the blocks.
        scale: As for the blocks.
        rates: Probability that training drops the residual, for each block.
        reparam: As for the blocks.
        **dd: Device and type of the parameters.
    """
    downsample = nn.Identity() if in_dim is None else halve(in_dim, dim, **dd)
    blocks = [RepConvBlock(dim, kernel_size, scale, rate, reparam, **dd) for rate in rates]
    return ChannelsLastStage(downsample, blocks)


def rep_conv_stem(in_chans: int, dim: int, **dd: Any) -> nn.Sequential:
    """Make four 3x3 convolutions with BatchNorm, the first and the third of stride 2.

    Args:
        in_chans: Channels of the images.
        dim: Output channels.
        **dd: Device and type of the parameters.
    """
    half = dim // 2
    return nn.Sequential(
        ConvNormAct(in_chans, half, stride=2, bias=False, **dd),
        ConvNormAct(half, half, bias=False, **dd),
        ConvNormAct(half, dim, stride=2, bias=False, **dd),
        ConvNormAct(dim, dim, act_layer=None, bias=False, **dd),
    )
