"""Attention in windows or grids of a map, with a feed forward network (MaxViT, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, LayerScale, is_exportable
from torch import Tensor, nn

from backbones.ops import window_attention, window_attention_reference

from .fold import fold_layer_norm, fold_layer_scale
from .gelu import Gelu, GeluTanh
from .mlp import Mlp
from .relative_position import (
    RelativePositionBias,
    RelativePositionBiasTf,
    RelativePositionMlp,
    Window,
)

REL_POS = {
    "tf": RelativePositionBiasTf,
    "rw": RelativePositionBias,
    "rmlp": RelativePositionMlp,
}


class PartitionAttention(nn.Module):
    """Multi-head attention within the windows of a map, heads of 32 channels.

    The map may have any size: tokens that a window lacks are hidden.

    Args:
        dim: Width of the map, a multiple of 32.
        window_size: Rows and columns of a window.
        grid: Windows of tokens spread over the map, instead of neighbours.
        style: "tf" for the conventions of the TensorFlow release: q, k and v packed one after the
            other, a table at key minus query. "rw" and "rmlp" for those of timm's own models:
            packed head by head, a flat table or an MLP.
        out_dim: Width of the output; `dim` if None.
        device: Where parameters are made.
        dtype: Their type.
    """

    __constants__ = ("exportable",)

    def __init__(
        self,
        dim: int,
        window_size: Window,
        grid: bool,
        style: str,
        out_dim: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = dim // 32
        self.window_size = window_size
        self.grid = grid
        self.head_first = style != "tf"
        self.exportable = is_exportable()
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.rel_pos = REL_POS[style](window_size, self.num_heads, **dd)
        self.proj = nn.Linear(dim, out_dim or dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, H, W, dim)`, return `(B, H, W, out_dim)`."""
        qkv, table = self.qkv(x), self.rel_pos.get_table()
        heads, window, scale = self.num_heads, self.window_size, 32**-0.5
        if self.exportable:
            x = window_attention_reference(
                qkv, table, heads, window, self.grid, self.head_first, None, scale
            )
        else:
            x = window_attention(qkv, table, heads, window, self.grid, self.head_first, None, scale)
        return self.proj(x)

    def set_window_size(self, window_size: Window) -> None:
        """Attend in other windows, with the relative positions resized."""
        self.rel_pos.set_window_size(window_size)
        self.window_size = window_size


def norm_and_act(style: str) -> tuple[Callable[..., nn.LayerNorm], Callable[..., nn.Module]]:
    """LayerNorm and activation of a style, with their eps and approximation."""
    if style == "tf":
        return partial(LayerNorm, eps=1e-5), GeluTanh
    return partial(LayerNorm, eps=1e-6), Gelu


class PartitionBlock(nn.Module):
    """Attention in one partition and a feed forward network, each after a norm, with a residual.

    Args:
        dim: Width of the map.
        window_size: Rows and columns of a window.
        grid: Windows of tokens spread over the map, instead of neighbours.
        style: As in `PartitionAttention`.
        init_values: First value of a LayerScale after both branches, None for no LayerScale.
        drop_path: Probability that training drops a branch.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        dim: int,
        window_size: Window,
        grid: bool,
        style: str,
        init_values: float | None = None,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        norm, act = norm_and_act(style)

        def layer_scale() -> nn.Module:
            return nn.Identity() if init_values is None else LayerScale(dim, init_values, **dd)

        self.norm1 = norm(dim, **dd)
        self.attn = PartitionAttention(dim, window_size, grid, style, **dd)
        self.ls1 = layer_scale()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm(dim, **dd)
        self.mlp = Mlp(dim, 4 * dim, act_layer=act, **dd)
        self.ls2 = layer_scale()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    @torch.no_grad()
    def fuse(self) -> PartitionBlock:
        """Fold norm weights and layer scales into the linear layers; return the block."""
        self.norm1 = fold_layer_norm(self.norm1, self.attn.qkv)
        self.norm2 = fold_layer_norm(self.norm2, self.mlp.fc1)
        self.ls1 = fold_layer_scale(self.attn.proj, self.ls1)
        self.ls2 = fold_layer_scale(self.mlp.fc2, self.ls2)
        return self


class ParallelPartitionBlock(nn.Module):
    """Attention in windows and in a grid side by side, then one feed forward network (timm's "PM").

    Each attention gives one half of the channels.

    Args:
        dim: Width of the map.
        window_size: Rows and columns of a window, of both partitions.
        style: As in `PartitionAttention`.
        drop_path: Probability that training drops a branch.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        dim: int,
        window_size: Window,
        style: str,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        norm, act = norm_and_act(style)
        self.norm1 = norm(dim, **dd)
        self.attn_block = PartitionAttention(dim, window_size, False, style, dim // 2, **dd)
        self.attn_grid = PartitionAttention(dim, window_size, True, style, dim // 2, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm(dim, **dd)
        self.mlp = Mlp(dim, 4 * dim, act_layer=act, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`."""
        y = self.norm1(x)
        x = x + self.drop_path1(torch.cat([self.attn_block(y), self.attn_grid(y)], dim=-1))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    @torch.no_grad()
    def fuse(self) -> ParallelPartitionBlock:
        """Fold norm weights into the linear layers; return the block."""
        self.norm1 = fold_layer_norm(self.norm1, self.attn_block.qkv, self.attn_grid.qkv)
        self.norm2 = fold_layer_norm(self.norm2, self.mlp.fc1)
        return self
