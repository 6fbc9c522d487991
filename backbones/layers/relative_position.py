"""Relative position bias: three ways to the table that `backbones.ops.window_attention` reads.

The `get_table()` of each module gives `(heads, 2P - 1, 2Q - 1)` for windows of P x Q tokens; the
bias of query i and key j stands at row `yi - yj + P - 1` and column `xi - xj + Q - 1`.

A method and not `forward`: hooks on modules, those of PyTorch's FLOP counter among them, stumble
over a view of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt, prod
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn

from .resize_table import resize_table

Window = tuple[int, int]


def offsets(window: Window) -> tuple[int, int]:
    """Rows and columns of a table for windows `(P, Q)`: `2P - 1` and `2Q - 1`."""
    return 2 * window[0] - 1, 2 * window[1] - 1


def resize_flat_table(table: Tensor, source: Window, window: Window) -> Tensor:
    """Interpolate a table `((2P - 1) * (2Q - 1), heads)` for windows of another size.

    Args:
        table: The table.
        source: The window that it is for.
        window: The new window.

    Returns:
        The table for `window`, contiguous.
    """
    if source == window:
        return table
    resized = resize_table(table.unflatten(0, offsets(source)).permute(2, 0, 1), *offsets(window))
    return resized.permute(1, 2, 0).flatten(0, 1).contiguous()


class RelativePositionBias(nn.Module):
    """A free parameter per offset and head, the offsets in one dimension (Swin, arXiv 2103.14030).

    Args:
        window_size: Rows and columns of a window.
        num_heads: Heads.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self, window_size: Window, num_heads: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.window_size = window_size
        table = torch.empty(prod(offsets(window_size)), num_heads, device=device, dtype=dtype)
        self.relative_position_bias_table = nn.Parameter(trunc_normal_(table, std=0.02))

    def get_table(self) -> Tensor:
        """Return the table, a view of the parameter."""
        rows, cols = 2 * self.window_size[0] - 1, 2 * self.window_size[1] - 1
        return self.relative_position_bias_table.view(rows, cols, -1).permute(2, 0, 1)

    def fit(self, table: Tensor) -> Tensor:
        """Resize the table of a checkpoint, of a square window unless it has this one's size.

        Raises:
            ValueError: The table is of neither window.
        """
        count, side = len(table), isqrt(len(table))
        if side * side == count:
            return resize_flat_table(table, ((side + 1) // 2, (side + 1) // 2), self.window_size)
        if count == prod(offsets(self.window_size)):
            return table
        raise ValueError(
            f"a table of {count} offsets is of a window that is not square, and not of "
            f"{self.window_size}: create the model with the window size of the weights"
        )

    @torch.no_grad()
    def set_window_size(self, window_size: Window) -> None:
        """Interpolate the table for another window."""
        old = self.relative_position_bias_table
        table = resize_flat_table(old, self.window_size, window_size)
        self.window_size = window_size
        self.relative_position_bias_table = nn.Parameter(table, old.requires_grad)

    @torch.no_grad()
    def fuse(self) -> RelativePositionTable:
        """Return the finished table."""
        return RelativePositionTable(self.get_table(), self.window_size)


class RelativePositionBiasTf(nn.Module):
    """A free parameter per offset and head, at key minus query (MaxViT, TensorFlow release).

    Args:
        window_size: Rows and columns of a window.
        num_heads: Heads.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self, window_size: Window, num_heads: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.window_size = window_size
        table = torch.empty(num_heads, *offsets(window_size), device=device, dtype=dtype)
        self.relative_position_bias_table = nn.Parameter(nn.init.normal_(table, std=0.02))

    def get_table(self) -> Tensor:
        """Return the table with the offsets the other way round."""
        return self.relative_position_bias_table.flip(1, 2)

    def fit(self, table: Tensor) -> Tensor:
        """Resize the table of a checkpoint."""
        return resize_table(table, *offsets(self.window_size))

    @torch.no_grad()
    def set_window_size(self, window_size: Window) -> None:
        """Interpolate the table for another window."""
        old = self.relative_position_bias_table
        self.window_size = window_size
        self.relative_position_bias_table = nn.Parameter(
            resize_table(old, *offsets(window_size)), old.requires_grad
        )

    @torch.no_grad()
    def fuse(self) -> RelativePositionTable:
        """Return the finished table."""
        return RelativePositionTable(self.get_table(), self.window_size)


class RelativePositionMlp(nn.Module):
    """Two linear layers of the logarithms of an offset (after Swin V2, arXiv 2111.09883).

    The offsets enter as `sign(d) * ln(1 + |d|)`. In training an eighth of the hidden units is
    dropped. What follows from the window is no buffer, as in `RotaryPosition`.

    Args:
        window_size: Rows and columns of a window.
        num_heads: Heads.
        hidden_dim: Units between the two layers.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        window_size: Window,
        num_heads: int,
        hidden_dim: int = 512,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.window_size = window_size
        self.mlp = Mlp(2, hidden_dim, num_heads, act_layer=nn.ReLU, drop=(0.125, 0.0), **dd)
        self.log_offsets = _log_offsets(window_size, torch.empty(0, device=device).device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RelativePositionMlp:
        super()._apply(fn, recurse)
        self.log_offsets = _log_offsets(self.window_size, fn(self.log_offsets).device)
        return self

    def get_table(self) -> Tensor:
        """Return the table, computed anew."""
        return self.mlp(self.log_offsets.to(self.mlp.fc1.weight)).permute(2, 0, 1)

    def set_window_size(self, window_size: Window) -> None:
        """Compute the offsets of another window; no parameter changes."""
        self.window_size = window_size
        self.log_offsets = _log_offsets(window_size, self.log_offsets.device)

    @torch.no_grad()
    def fuse(self) -> RelativePositionTable:
        """Return the finished table, without dropout."""
        return RelativePositionTable(self.eval().get_table(), self.window_size)


def _log_offsets(window: Window, device: torch.device) -> Tensor:
    """`(2P - 1, 2Q - 1, 2)`, in float32: a model made in float32 equals its copy."""
    axes = [torch.arange(1 - n, n, dtype=torch.float32, device="cpu") for n in window]
    logs = [axis.sign() * (1 + axis.abs()).log() for axis in axes]
    values = torch.stack(torch.meshgrid(*logs, indexing="ij"), dim=-1)
    # the meta device has no values to move to another one later
    return values if device.type == "meta" else values.to(device)


class RelativePositionTable(nn.Module):
    """A finished table, what `fuse()` leaves of the others.

    Args:
        table: `(heads, 2P - 1, 2Q - 1)`.
        window_size: Rows and columns of a window.
    """

    if TYPE_CHECKING:
        table: Tensor

    def __init__(self, table: Tensor, window_size: Window) -> None:
        super().__init__()
        self.window_size = window_size
        self.register_buffer("table", table.contiguous())

    def get_table(self) -> Tensor:
        """Return the table."""
        return self.table

    def set_window_size(self, window_size: Window) -> None:
        """Refuse another window: what the table was made from is gone.

        Raises:
            ValueError: `window_size` is not the table's.
        """
        if window_size != self.window_size:
            raise ValueError(f"window_size={window_size} comes too late: set it before fuse()")
