"""Attention over all tokens of a map with a local enhancement (BiFormer's last stage)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import is_exportable
from torch import Tensor, nn

from backbones.ops import depthwise_conv, depthwise_conv_reference

from .fold import fold_layer_norm


def lepe(dim: int, **dd: Any) -> nn.Conv2d:
    """Make a local enhancement (LEPE, CSWin, arXiv 2107.00652): a depthwise 5x5 convolution.

    Args:
        dim: Channels.
        **dd: Device and type of the parameters.
    """
    return nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)


class LepeAttention(nn.Module):
    """Multi-head attention over all tokens of a map, plus a local enhancement.

    Scores are scaled by the width of a head, those of `BiLevelRoutingAttention` by that of the map.

    Args:
        dim: Channels of the map.
        num_heads: Heads.
        lepe_on_values: Enhance the values, as in `biformer_stl_nchw`, instead of what comes in.
        device: Where parameters are made.
        dtype: Their type.
    """

    __constants__ = ("exportable",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        lepe_on_values: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.lepe_on_values = lepe_on_values
        self.exportable = is_exportable()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.lepe = lepe(dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`."""
        batch, height, width, dim = x.shape
        qkv = self.qkv(x)
        parts = qkv.reshape(batch, height * width, 3, self.num_heads, dim // self.num_heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        y = y.transpose(1, 2).reshape(batch, height, width, dim)
        local = qkv[..., 2 * dim :] if self.lepe_on_values else x
        if self.exportable:
            y = depthwise_conv_reference(local, self.lepe.weight, self.lepe.bias, y)
        else:
            y = depthwise_conv(local, self.lepe.weight, self.lepe.bias, y)
        return self.proj(y)

    def fold_norm(self, norm: nn.LayerNorm) -> nn.LayerNorm:
        """Take over weight and bias of the norm before, unless the enhancement needs them too."""
        return fold_layer_norm(norm, self.qkv) if self.lepe_on_values else norm
