"""The block of BiFormer (arXiv 2303.08810, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm
from torch import Tensor, nn

from .fold import fold_layer_norm
from .lepe_attention import LepeAttention
from .mlp import Mlp
from .position_conv import ConvPositionEncoding
from .routing_attention import BiLevelRoutingAttention


class RoutingBlock(nn.Module):
    """Position encoding, attention and a feed forward network, the latter two with a residual.

    The position encoding computes the norm behind it, from the parameters of `norm1`: this module
    is not called then, nor are its hooks.

    Args:
        dim: Width of the map.
        attention: Makes the attention: `attention(dim, device=, dtype=)`.
        mlp_ratio: Hidden width over width of the feed forward network.
        position_encoding: Whether there is one.
        drop_path: Probability that training drops a branch.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        dim: int,
        attention: Callable[..., BiLevelRoutingAttention | LepeAttention],
        mlp_ratio: int,
        position_encoding: bool = True,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.cpe = ConvPositionEncoding(dim, **dd) if position_encoding else None
        self.norm1 = LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attention(dim, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, mlp_ratio * dim, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`."""
        if self.cpe is None:
            y = self.norm1(x)
        else:
            x, y = self.cpe(x, self.norm1.weight, self.norm1.bias, self.norm1.eps)
        x = x + self.drop_path1(self.attn(y))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    @torch.no_grad()
    def fuse(self) -> RoutingBlock:
        """Fold norm weights into the linear layers; return the block."""
        self.norm1 = self.attn.fold_norm(self.norm1)
        self.norm2 = fold_layer_norm(self.norm2, self.mlp.fc1)
        return self
