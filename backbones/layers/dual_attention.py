"""The two attentions of DaViT and the block around each (arXiv 2204.03645, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import DropPath, LayerNorm, is_exportable
from torch import Tensor, nn

from backbones.ops import (
    channel_attention,
    channel_attention_reference,
    window_attention,
    window_attention_reference,
)

from .fold import fold_layer_norm
from .mlp import Mlp
from .position_conv import ConvPositionEncoding


class WindowAttention(nn.Module):
    """Multi-head attention within the windows of a map.

    A map that the windows do not fill is continued with zeros *before* `qkv`, and its tokens are
    not masked: tokens outside the map have the bias of `qkv` as query, key and value. The released
    weights were trained so.

    Args:
        dim: Width of the map.
        num_heads: Heads.
        window_size: Rows and columns of a window.
        device: Where parameters are made.
        dtype: Their type.
    """

    __constants__ = ("exportable",)

    # torch.jit.script stumbles over annotations of a module class
    if TYPE_CHECKING:
        outside: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: tuple[int, int],
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window_size = window_size
        self.head_dim = dim // num_heads
        self.exportable = is_exportable()
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.register_buffer("outside", None)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`."""
        qkv, heads, window = self.qkv(x), self.num_heads, self.window_size
        outside = self.qkv.bias if self.outside is None else self.outside
        scale = self.head_dim**-0.5
        if self.exportable:
            x = window_attention_reference(qkv, None, heads, window, False, False, outside, scale)
        else:
            x = window_attention(qkv, None, heads, window, False, False, outside, scale)
        return self.proj(x)

    def fold_norm(self, norm: nn.LayerNorm) -> nn.LayerNorm:
        """Take over weight and bias of the norm before; tokens outside the map keep theirs."""
        if norm.weight is not None:
            self.outside = self.qkv.bias.detach().clone()
        return fold_layer_norm(norm, self.qkv)


class ChannelAttention(nn.Module):
    """Attention between the channels of a map, over all of its tokens.

    Args:
        dim: Width of the map.
        num_heads: Groups of channels that attend to each other.
        mix_values: Mix values by scores of queries and keys, scaled by the number of tokens
            (Florence-2); else queries by scores of keys and values.
        device: Where parameters are made.
        dtype: Their type.
    """

    __constants__ = ("exportable",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mix_values: bool,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.mix_values = mix_values
        self.exportable = is_exportable()
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`."""
        qkv = self.qkv(x)
        if self.exportable:
            x = channel_attention_reference(qkv, self.num_heads, self.mix_values)
        else:
            x = channel_attention(qkv, self.num_heads, self.mix_values)
        return self.proj(x)

    def fold_norm(self, norm: nn.LayerNorm) -> nn.LayerNorm:
        """Take over weight and bias of the norm before."""
        return fold_layer_norm(norm, self.qkv)


Attention = WindowAttention | ChannelAttention


class ConvAttentionBlock(nn.Module):
    """Attention and a feed forward network, each after a position encoding and with a residual.

    The position encodings compute the norms behind them, from parameters of `norm1` and `norm2`:
    these modules are not called, nor are their hooks.

    Args:
        dim: Width of the map.
        attention: Makes the attention: `attention(dim, device=, dtype=)`.
        drop_path: Probability that training drops a branch.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        dim: int,
        attention: Callable[..., Attention],
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.cpe1 = ConvPositionEncoding(dim, **dd)
        self.norm1 = LayerNorm(dim, eps=1e-5, **dd)
        self.attn = attention(dim, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.cpe2 = ConvPositionEncoding(dim, **dd)
        self.norm2 = LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = Mlp(dim, 4 * dim, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`."""
        x, y = self.cpe1(x, self.norm1.weight, self.norm1.bias, self.norm1.eps)
        x = x + self.drop_path1(self.attn(y))
        x, y = self.cpe2(x, self.norm2.weight, self.norm2.bias, self.norm2.eps)
        return x + self.drop_path2(self.mlp(y))

    @torch.no_grad()
    def fuse(self) -> ConvAttentionBlock:
        """Fold norm weights into the linear layers; return the block."""
        self.norm1 = self.attn.fold_norm(self.norm1)
        self.norm2 = fold_layer_norm(self.norm2, self.mlp.fc1)
        return self
