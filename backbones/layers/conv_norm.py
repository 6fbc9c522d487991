"""Layers with BatchNorm that `fuse()` into one layer for inference."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import timm.layers
import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .fold import batch_norm_affine, fold_norm_act


class ConvNorm(nn.Sequential):
    """Convolution without bias, padded to keep the size, and BatchNorm.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        kernel_size: Side of the kernel, odd.
        stride: Stride of the convolution.
        groups: Groups of the convolution.
        gamma: First value of the norm's weight; 0 makes a residual branch start as the identity.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        gamma: float = 1.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        padding = kernel_size // 2
        self.c = nn.Conv2d(
            in_chs, out_chs, kernel_size, stride, padding, groups=groups, bias=False, **dd
        )
        self.bn = nn.BatchNorm2d(out_chs, **dd)
        nn.init.constant_(self.bn.weight, gamma)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """Return one convolution with the running statistics folded in."""
        scale, shift = batch_norm_affine(self.bn)
        fused = copy.deepcopy(self.c)
        fused.weight = nn.Parameter(self.c.weight * scale[:, None, None, None])
        fused.bias = nn.Parameter(shift)
        return fused


class ConvNormAct(timm.layers.ConvNormAct):
    """Convolution, padded to keep the size, BatchNorm, and perhaps an activation.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        kernel_size: Side of the kernel, odd.
        stride: Stride of the convolution.
        act_layer: Makes the activation; None for none.
        bias: Whether the convolution has a bias.
        device: Where parameters are made.
        dtype: Their type.
    """

    # torch.jit.script stumbles over annotations of a module class
    if TYPE_CHECKING:
        bn: nn.Module

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 3,
        stride: int = 1,
        act_layer: type[nn.Module] | None = nn.GELU,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_chs,
            out_chs,
            kernel_size,
            stride,
            bias=bias,
            apply_act=act_layer is not None,
            act_layer=act_layer or nn.Identity,
            device=device,
            dtype=dtype,
        )

    @torch.no_grad()
    def fuse(self) -> ConvNormAct:
        """Fold the norm into the convolution; return the layer."""
        if isinstance(self.bn, nn.BatchNorm2d):
            self.bn = fold_norm_act(self.conv, self.bn)
        return self


class NormLinear(nn.Sequential):
    """BatchNorm and linear classifier.

    Args:
        in_features: Width of the pooled features.
        num_classes: Classes.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self, in_features: int, num_classes: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.bn = nn.BatchNorm1d(in_features, **dd)
        self.l = nn.Linear(in_features, num_classes, **dd)
        trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        """Return one linear layer with the running statistics folded in."""
        scale, shift = batch_norm_affine(self.bn)
        fused = copy.deepcopy(self.l)
        fused.weight = nn.Parameter(self.l.weight * scale)
        fused.bias = nn.Parameter(self.l.bias + self.l.weight @ shift)
        return fused


class Residual(nn.Module):
    """Add a branch to its input.

    Args:
        m: The branch.
    """

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, C, H, W)`."""
        return x + self.m(x)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Return a depthwise convolution with the addition in its centre taps, else itself."""
        if not isinstance(self.m, ConvNorm):
            return self
        fused = self.m.fuse()
        centre = fused.kernel_size[0] // 2
        fused.weight[:, 0, centre, centre] += 1
        return fused
