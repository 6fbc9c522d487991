"""Convolutions and pooling of stride 2 that need no padded copy of a wide map.

All return `ceil(n / 2)` rows and columns for `n`. Where they would have to ask whether a size is
even, `torch.compile` and `torch.export` get a form that does not ask: one graph for all sizes.
"""

from __future__ import annotations

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn


def _same_eager(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    odd_h, odd_w = x.shape[2] % 2, x.shape[3] % 2
    if groups == 1:
        # images have few channels: their padded copy is small
        x = F.pad(x, (odd_w, 1, odd_h, 1))
        return F.conv2d(x, weight, bias, 2, 0, 1, groups)
    # padded by two, an even map gives one row and one column too many, the first
    x = F.conv2d(x, weight, bias, 2, [2 - odd_h, 2 - odd_w], 1, groups)
    return x[:, :, 1 - odd_h :, 1 - odd_w :]


def _is_odd(size: int, device: torch.device) -> Tensor:
    """Whether `size` is odd, as a tensor `(1,)`: an answer in Python would hold for this graph."""
    return torch.arange(size, size + 1, device=device) % 2 == 1


def _same_traced(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    # both ways to pad, of one size, and a choice by value, which the compiler fuses with them
    odd_h, odd_w = _is_odd(x.shape[2], x.device), _is_odd(x.shape[3], x.device)
    x = torch.where(odd_h, F.pad(x, (0, 0, 1, 1)), F.pad(x, (0, 0, 0, 2)))
    x = torch.where(odd_w, F.pad(x, (1, 1)), F.pad(x, (0, 2)))
    return F.conv2d(x, weight, bias, 2, 0, 1, groups)


@torch.fx.wrap
def conv2d_same(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Convolve with a 3x3 kernel and stride 2, padded as TensorFlow's "same" does.

    Even sizes get a zero after the last row and column, odd ones a zero on both sides.

    Args:
        x: Map `(B, C, H, W)`.
        weight: Kernels `(C_out, C / groups, 3, 3)`.
        bias: Vector `(C_out,)`, or None.
        groups: Groups of channels.

    Returns:
        A map `(B, C_out, ceil(H / 2), ceil(W / 2))`.
    """
    if torch.jit.is_scripting():
        return _same_eager(x, weight, bias, groups)
    else:
        if torch.compiler.is_compiling():
            return _same_traced(x, weight, bias, groups)
        return _same_eager(x, weight, bias, groups)


class StridedConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 2, padded as TensorFlow's "same".

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        groups: Groups of channels.
        bias: Add a bias.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, 3, 2, groups=groups, bias=bias, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, C, H, W)`, return `(B, C_out, ceil(H / 2), ceil(W / 2))`."""
        return conv2d_same(x, self.weight, self.bias, self.groups)


def _pad_odd(x: Tensor) -> Tensor:
    odd_h, odd_w = x.shape[2] % 2, x.shape[3] % 2
    return F.pad(x, (0, odd_w, 0, odd_h)) if odd_h + odd_w > 0 else x


@torch.fx.wrap
def conv2d_patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve patches of 2x2 pixels, with a zero after the last row and column of odd sizes.

    Args:
        x: Map `(B, C, H, W)`.
        weight: Kernels `(C_out, C, 2, 2)`.
        bias: Vector `(C_out,)`, or None.

    Returns:
        A map `(B, C_out, ceil(H / 2), ceil(W / 2))`.
    """
    if torch.jit.is_scripting():
        return F.conv2d(_pad_odd(x), weight, bias, 2)
    else:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            # the zero that an even size has too much is in no patch
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias, 2)
        return F.conv2d(_pad_odd(x), weight, bias, 2)


class PatchConv2d(nn.Conv2d):
    """A 2x2 convolution of stride 2 that completes odd sizes with zeros (see `conv2d_patches`).

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 2, 2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, C, H, W)`, return `(B, C_out, ceil(H / 2), ceil(W / 2))`."""
        return conv2d_patches(x, self.weight, self.bias)


def _pool_traced(x: Tensor) -> Tensor:
    # PyTorch's pooling asks whether sizes are even; the compiler fuses this sum as well
    height, width = x.shape[2], x.shape[3]
    x = F.pad(x, (0, 1, 0, 1))
    x = x[:, :, :-1:2] + x[:, :, 1::2]
    x = (x[..., :-1:2] + x[..., 1::2]) / 4
    rows = torch.arange(x.shape[2], device=x.device)[:, None]
    cols = torch.arange(x.shape[3], device=x.device)
    shares = (1 + (2 * rows + 1 >= height).to(x.dtype)) * (1 + (2 * cols + 1 >= width).to(x.dtype))
    return x * shares


@torch.fx.wrap
def avg_pool2d_ceil(x: Tensor) -> Tensor:
    """Average windows of 2x2 pixels; those over the edge average what they hold of the map.

    Args:
        x: Map `(B, C, H, W)`.

    Returns:
        A map `(B, C, ceil(H / 2), ceil(W / 2))`.
    """
    if torch.jit.is_scripting():
        return F.avg_pool2d(x, 2, 2, 0, True, False)
    else:
        if torch.compiler.is_compiling():
            return _pool_traced(x)
        return F.avg_pool2d(x, 2, 2, 0, True, False)


class AvgPool2dCeil(nn.Module):
    """Halve a map by averaging 2x2 windows, rounding odd sizes up (see `avg_pool2d_ceil`)."""

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, C, H, W)`, return `(B, C, ceil(H / 2), ceil(W / 2))`."""
        return avg_pool2d_ceil(x)


def _pool(x: Tensor, average: bool, stride: int) -> Tensor:
    if average:
        return F.avg_pool2d(x, 3, stride, 1, False, False)
    return F.max_pool2d(x, 3, stride, 1)


@torch.fx.wrap
def pool2d_overlapping(x: Tensor, average: bool) -> Tensor:
    """Pool windows of 3x3 pixels around every second one; what is outside the map does not count.

    Args:
        x: Map `(B, C, H, W)`.
        average: Take the mean, else the maximum.

    Returns:
        A map `(B, C, ceil(H / 2), ceil(W / 2))`.
    """
    if torch.jit.is_scripting():
        return _pool(x, average, 2)
    else:
        if torch.compiler.is_compiling():
            # stride 2 asks whether sizes are even in some versions, as slices of odd maps do
            x = F.pad(_pool(x, average, 1), (0, 1, 0, 1))
            return x[:, :, :-1:2, :-1:2]
        return _pool(x, average, 2)


class OverlappingPool2d(nn.Module):
    """Halve a map by pooling 3x3 windows, rounding odd sizes up (see `pool2d_overlapping`).

    Args:
        average: Take means, else maxima.
    """

    __constants__ = ("average",)

    def __init__(self, average: bool = False) -> None:
        super().__init__()
        self.average = average

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, C, H, W)`, return `(B, C, ceil(H / 2), ceil(W / 2))`."""
        return pool2d_overlapping(x, self.average)

    def extra_repr(self) -> str:
        """Show the kind when the model is printed."""
        return f"average={self.average}"
