"""Linear attention and the block around it (L2ViT, arXiv 2501.16182, official code)."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, is_exportable
from torch import Tensor, nn

from backbones.ops import linear_attention, linear_attention_reference

from .fold import fold_layer_norm
from .local_concentration import LocalConcentration
from .mlp import Mlp
from .position_conv import ConvPositionEncoding


class LinearAttention(nn.Module):
    """Attention over all tokens of a map at a cost that is linear in their number.

    Queries and keys pass a ReLU in place of a softmax, the denominator is 100 at least, and every
    head has a learned temperature; see `backbones.ops.linear_attention`. It sees no positions:
    convolutions beside it are to give them. For maps of any size.

    Args:
        dim: Width of the map.
        num_heads: Heads.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ValueError: A width that the heads do not divide.

    Example:
        >>> LinearAttention(64, num_heads=2)(torch.randn(2, 25, 38, 64)).shape
        torch.Size([2, 25, 38, 64])
    """

    __constants__ = ("exportable",)

    def __init__(self, dim: int, num_heads: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.exportable = is_exportable()
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.temperature = nn.Parameter(
            torch.full((num_heads, 1, 1), (dim // num_heads) ** -0.5, **dd)
        )
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`."""
        qkv, temperature = self.qkv(x), self.temperature.flatten()
        if self.exportable:
            return self.proj(linear_attention_reference(qkv, temperature))
        return self.proj(linear_attention(qkv, temperature))

    def fold_norm(self, norm: nn.LayerNorm) -> nn.LayerNorm:
        """Take over weight and bias of the norm before."""
        return fold_layer_norm(norm, self.qkv)


class LinearAttentionBlock(nn.Module):
    """Linear attention, local concentration and a feed forward network, each with a residual.

    The position encoding computes the norm behind it, from the parameters of `norm1`: this module
    is not called, nor are its hooks.

    Args:
        dim: Width of the map.
        num_heads: Heads of the attention.
        drop_path: Probability that training drops a branch.
        device: Where parameters are made.
        dtype: Their type.

    Example:
        >>> LinearAttentionBlock(64, num_heads=2)(torch.randn(2, 25, 38, 64)).shape
        torch.Size([2, 25, 38, 64])
    """

    __constants__ = ("drops",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.drops = drop_path > 0.0
        self.cpe1 = ConvPositionEncoding(dim, **dd)
        self.norm1 = LayerNorm(dim, eps=1e-5, **dd)
        self.attn = LinearAttention(dim, num_heads, **dd)
        self.drop_path1 = DropPath(drop_path) if self.drops else nn.Identity()
        self.local_norm = LayerNorm(dim, eps=1e-5, **dd)
        self.local = LocalConcentration(dim, **dd)
        self.drop_path2 = DropPath(drop_path) if self.drops else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = Mlp(dim, 4 * dim, **dd)
        self.drop_path3 = DropPath(drop_path) if self.drops else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`."""
        x, y = self.cpe1(x, self.norm1.weight, self.norm1.bias, self.norm1.eps)
        x = x + self.drop_path1(self.attn(y))
        y = self.local_norm(x)
        x = x + self.drop_path2(self.local(y)) if self.drops and self.training else self.local(y, x)
        return x + self.drop_path3(self.mlp(self.norm2(x)))

    @torch.no_grad()
    def fuse(self) -> LinearAttentionBlock:
        """Fold norm weights into the linear layers; return the block."""
        self.norm1 = self.attn.fold_norm(self.norm1)
        self.norm2 = fold_layer_norm(self.norm2, self.mlp.fc1)
        return self
