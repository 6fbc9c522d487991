"""Blocks and stages of MaxViT (arXiv 2204.01697, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.models import checkpoint_seq
from torch import Tensor, nn

from .mbconv import MBConv
from .partition_attention import ParallelPartitionBlock, PartitionBlock
from .relative_position import Window


class MultiAxisBlock(nn.Module):
    """MBConv, attention in windows, attention in a grid.

    Args:
        in_dim: Width of the map that comes in.
        dim: Width of the block.
        stride: Stride of the MBConv.
        drop_path: Probability that training drops a branch.
        style: "tf", "rw" or "rmlp".
        window_size: Rows and columns of a window.
        grid_size: Rows and columns of a grid.
        init_values: First value of the LayerScales, None for none.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        stride: int,
        drop_path: float,
        *,
        style: str,
        window_size: Window,
        grid_size: Window,
        init_values: float | None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = MBConv(in_dim, dim, stride, style == "tf", drop_path, **dd)
        args = (style, init_values, drop_path)
        self.attn_block = PartitionBlock(dim, window_size, False, *args, **dd)
        self.attn_grid = PartitionBlock(dim, grid_size, True, *args, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, in_dim, H, W)`, return `(B, dim, H / stride, W / stride)`."""
        x = self.conv(x).permute(0, 2, 3, 1)
        return self.attn_grid(self.attn_block(x)).permute(0, 3, 1, 2)

    def set_partition_size(self, window_size: Window, grid_size: Window) -> None:
        """Attend in other windows and another grid."""
        self.attn_block.attn.set_window_size(window_size)
        self.attn_grid.attn.set_window_size(grid_size)


class ParallelMultiAxisBlock(nn.Module):
    """Two MBConvs, then attention in windows and in a grid side by side.

    Args:
        in_dim: Width of the map that comes in.
        dim: Width of the block.
        stride: Stride of the first MBConv.
        drop_path: Probability that training drops a branch.
        style: "tf", "rw" or "rmlp".
        partition_size: Rows and columns of a window, and of a grid.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        stride: int,
        drop_path: float,
        *,
        style: str,
        partition_size: Window,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Sequential(
            MBConv(in_dim, dim, stride, style == "tf", drop_path, **dd),
            MBConv(dim, dim, 1, style == "tf", drop_path, **dd),
        )
        self.attn = ParallelPartitionBlock(dim, partition_size, style, drop_path, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, in_dim, H, W)`, return `(B, dim, H / stride, W / stride)`."""
        x = self.conv(x).permute(0, 2, 3, 1)
        return self.attn(x).permute(0, 3, 1, 2)

    def set_partition_size(self, window_size: Window, grid_size: Window) -> None:
        """Attend in other windows, and a grid of the same size."""
        self.attn.attn_block.set_window_size(window_size)
        self.attn.attn_grid.set_window_size(grid_size)


class MultiAxisStage(nn.Module):
    """Blocks of one width, the first of which halves the map.

    Args:
        in_dim: Width of the map that comes in.
        dim: Width of the stage.
        drop_path: The rate of every block.
        block: Makes a block of two widths, a stride and a rate.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        drop_path: Sequence[float],
        block: Callable[[int, int, int, float], nn.Module],
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        first, *others = drop_path
        self.blocks = nn.Sequential(
            block(in_dim, dim, 2, first), *(block(dim, dim, 1, rate) for rate in others)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, in_dim, H, W)`, return `(B, dim, ceil(H / 2), ceil(W / 2))`."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)
