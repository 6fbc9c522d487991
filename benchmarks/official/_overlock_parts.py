"""Layers of the official OverLoCK, on planes `(B, C, H, W)`, of the sizes of ours."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.Module):
    """LayerNorm over channels, between two copies of the map."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.weight, self.bias = copy.deepcopy([ours.weight, ours.bias])
        self.eps = ours.eps

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, C, H, W)`."""
        x = x.permute(0, 2, 3, 1).contiguous()
        x = F.layer_norm(x, x.shape[3:], self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2).contiguous()


class Linear2d(nn.Module):
    """A 1x1 convolution, with the weight of a linear layer."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.weight, self.bias = copy.deepcopy([ours.weight, ours.bias])

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, C, H, W)`, return `(B, C', H, W)`."""
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


class AffineScale(nn.Module):
    """Scale and shift channels by a depthwise 1x1 convolution; nothing where ours has none."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.weight, self.bias = (
            (None, None) if ours is None else copy.deepcopy([ours.weight, ours.bias])
        )

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, C, H, W)`."""
        if self.weight is None:
            return x
        return F.conv2d(x, self.weight[:, None, None, None], self.bias, groups=x.shape[1])


def batch_norm(ours: Any) -> nn.BatchNorm2d:
    """BatchNorm without the activation that ours may compute.

    Args:
        ours: Our norm.
    """
    like = {"device": ours.weight.device, "dtype": ours.weight.dtype}
    return nn.BatchNorm2d(ours.num_features, ours.eps, ours.momentum, **like)


def conv_norm(ours: Any) -> nn.Module:
    """A convolution, 1x1 where ours is a linear layer, and BatchNorm.

    Args:
        ours: Our layer; an Identity or None where there is none.
    """
    if ours is None or isinstance(ours, nn.Identity):
        return nn.Identity()
    norm = batch_norm(ours.bn)
    if hasattr(ours, "linear"):
        return nn.Sequential(OrderedDict(linear=Linear2d(ours.linear), bn=norm))
    return nn.Sequential(OrderedDict(conv=copy.deepcopy(ours.conv), bn=norm))
