"""The convolutions of MaxViT: a stem, and inverted bottlenecks with squeeze-excite (MBConv)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import BatchNormAct2d, DropPath, is_exportable
from torch import Tensor, nn

from .fold import batch_norm_affine, fold_input, fold_norm_act
from .gelu import GeluTanh
from .squeeze_excite import SqueezeExcite
from .strided import AvgPool2dCeil, StridedConv2d


def batch_norm_act(dim: int, tensorflow: bool, act: bool = True, **dd: Any) -> BatchNormAct2d:
    """BatchNorm and activation in the convolutions of one of the two families of weights.

    Args:
        dim: Channels.
        tensorflow: GELU by tanh and eps 1e-3 (TensorFlow release), else SiLU and 1e-5 (timm).
        act: Apply the activation.
        **dd: Device and type.
    """
    eps = 1e-3 if tensorflow else 1e-5
    layer = GeluTanh if tensorflow else nn.SiLU
    return BatchNormAct2d(dim, eps=eps, apply_act=act, act_layer=layer, **dd)


def strided_conv(
    in_chs: int, out_chs: int, tensorflow: bool, groups: int = 1, bias: bool = False, **dd: Any
) -> nn.Conv2d:
    """A 3x3 convolution of stride 2, padded as TensorFlow does or by one pixel on every side."""
    if tensorflow:
        return StridedConv2d(in_chs, out_chs, groups=groups, bias=bias, **dd)
    return nn.Conv2d(in_chs, out_chs, 3, 2, 1, groups=groups, bias=bias, **dd)


class ConvStem(nn.Module):
    """Two 3x3 convolutions, the first of stride 2 and with norm and activation.

    Args:
        in_chans: Channels of the images.
        width: Channels after each convolution.
        tensorflow: Conventions of the TensorFlow release, else of timm's own models.
    """

    def __init__(
        self,
        in_chans: int,
        width: Sequence[int],
        tensorflow: bool,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = strided_conv(in_chans, width[0], tensorflow, bias=tensorflow, **dd)
        self.norm1 = batch_norm_act(width[0], tensorflow, **dd)
        self.conv2 = nn.Conv2d(width[0], width[1], 3, 1, 1, bias=tensorflow, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take images `(B, in_chans, H, W)`, return a map of half their size, rounded up."""
        return self.conv2(self.norm1(self.conv1(x)))

    @torch.no_grad()
    def fuse(self) -> ConvStem:
        """Fold the norm into the first convolution; return the stem."""
        if isinstance(self.norm1, nn.BatchNorm2d):
            self.norm1 = fold_norm_act(self.conv1, self.norm1)
        return self


class PoolShortcut(nn.Module):
    """Halve a map by averaging, then widen it if need be.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        bias: Add a bias to the 1x1 convolution.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self, in_chs: int, out_chs: int, bias: bool, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pool = AvgPool2dCeil()
        self.expand = (
            nn.Conv2d(in_chs, out_chs, 1, bias=bias, **dd) if in_chs != out_chs else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, in_chs, H, W)`, return `(B, out_chs, ceil(H / 2), ceil(W / 2))`."""
        return self.expand(self.pool(x))


class MBConv(nn.Module):
    """BatchNorm, 1x1 expansion, depthwise 3x3, squeeze-excite, 1x1 projection, with a residual.

    The two families of weights differ in width (four times the output's or the input's channels),
    biases, padding, activation and eps. On odd maps the average of the shortcut counts only pixels
    of the map, as TensorFlow's does; timm's TensorFlow models count the zeros that they pad with,
    and its other models have no odd maps.

    After `fuse()` the depthwise convolution, the activations around it and the average are one op.

    Args:
        in_chs: Input channels.
        out_chs: Output channels; equal to `in_chs` with stride 1.
        stride: 1, or 2 to halve the map.
        tensorflow: Conventions of the TensorFlow release, else of timm's own models.
        drop_path: Probability that training drops the branch.
        device: Where parameters are made.
        dtype: Their type.
    """

    __constants__ = ("exportable", "fused")

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int = 1,
        tensorflow: bool = False,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        mid_chs = 4 * (out_chs if tensorflow else in_chs)
        squeezed = out_chs // 4 if tensorflow else mid_chs // 16
        self.exportable, self.fused = is_exportable(), False
        self.same, self.act = tensorflow and stride == 2, "gelu_tanh" if tensorflow else "silu"
        self.shortcut = (
            PoolShortcut(in_chs, out_chs, tensorflow, **dd) if stride == 2 else nn.Identity()
        )
        self.pre_norm = batch_norm_act(in_chs, tensorflow, act=False, **dd)
        self.conv1_1x1 = nn.Conv2d(in_chs, mid_chs, 1, bias=False, **dd)
        self.norm1 = batch_norm_act(mid_chs, tensorflow, **dd)
        self.conv2_kxk = (
            strided_conv(mid_chs, mid_chs, tensorflow, groups=mid_chs, **dd)
            if stride == 2
            else nn.Conv2d(mid_chs, mid_chs, 3, 1, 1, groups=mid_chs, bias=False, **dd)
        )
        self.norm2 = batch_norm_act(mid_chs, tensorflow, **dd)
        self.se = SqueezeExcite(mid_chs, rd_channels=squeezed, act_layer="silu", **dd)
        self.conv3_1x1 = nn.Conv2d(mid_chs, out_chs, 1, bias=tensorflow, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, in_chs, H, W)`, return `(B, out_chs, ceil(H / s), ceil(W / s))`."""
        shortcut = self.shortcut(x)
        x = self.conv1_1x1(self.pre_norm(x))
        if self.fused and not self.exportable:
            # norm1 and norm2 are activations now
            conv = self.conv2_kxk
            stride, act = conv.stride[0], self.act
            x = self.se.forward_conv(x, conv.weight, conv.bias, stride, self.same, act, act)
        else:
            x = self.se(self.norm2(self.conv2_kxk(self.norm1(x))))
        return self.drop_path(self.conv3_1x1(x)) + shortcut

    @torch.no_grad()
    def fuse(self) -> MBConv:
        """Fold the three norms into the convolutions beside them; return the block."""
        if not self.fused:
            fold_input(self.conv1_1x1, *batch_norm_affine(self.pre_norm))
            self.pre_norm = nn.Identity()
            self.norm1 = fold_norm_act(self.conv1_1x1, self.norm1)
            self.norm2 = fold_norm_act(self.conv2_kxk, self.norm2)
            self.fused = True
        return self
