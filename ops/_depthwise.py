"""What the two depthwise convolutions and both of their implementations share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import accumulation_dtype, autocast

LARGEST = 17


class Window(NamedTuple):
    """Where a kernel of `size` by `size` taps is put.

    Attributes:
        size: Rows, and columns, of the kernel; odd.
        stride: Pixels from one position to the next.
        same: Zeros as TensorFlow's "same" puts them, with stride 2: none before the first row or
            column of an even number, and one after the last; else `size // 2` on all sides.
    """

    size: int
    stride: int = 1
    same: bool = False

    def pad(self, length: int) -> int:
        """Zeros before the first of `length` rows or columns."""
        return length % 2 if self.same else self.size // 2

    def out(self, length: int) -> int:
        """Positions along `length` rows or columns."""
        return (length - 1) // self.stride + 1


class Fused(NamedTuple):
    """What surrounds a convolution.

    Attributes:
        residual: Add what is convolved.
        pre_act: Activation before, one of `ACTIVATIONS`.
        act: Activation behind, residual and addend included.
    """

    residual: bool = False
    pre_act: str = ""
    act: str = ""


class Border(NamedTuple):
    """How far a map goes on with one vector.

    Attributes:
        bottom: Rows below.
        right: Columns to the right.
    """

    bottom: int
    right: int

    def extend(self, x: Tensor, vector: Tensor) -> Tensor:
        """Put a map `(B, H, W, C)` and its border `(C,)` together, differentiably."""
        batch, height, width, channels = x.shape
        x = torch.cat([x, vector.expand(batch, height, self.right, channels)], 2)
        return torch.cat([x, vector.expand(batch, self.bottom, width + self.right, channels)], 1)

    def crop(self, x: Tensor) -> Tensor:
        """Take the border off again, as a view."""
        return x[:, : x.shape[1] - self.bottom, : x.shape[2] - self.right]

    def sum(self, x: Tensor) -> Tensor:
        """Sum the border of a map `(C,)`: the gradient of its vector."""
        height, width = x.shape[1] - self.bottom, x.shape[2] - self.right
        dtype = accumulation_dtype(x.dtype)
        below = x[:, height:].sum((0, 1, 2), dtype=dtype)
        return (below + x[:, :height, width:].sum((0, 1, 2), dtype=dtype)).to(x.dtype)


def embed_dilated(weight: Tensor, dilation: int, size: int) -> Tensor:
    """Write dilated kernels as larger ones, with zeros between their taps, differentiably.

    Args:
        weight: Kernels `(C, 1, k, k)`, k odd.
        dilation: Distance of the taps.
        size: Side K of the result, odd, `dilation * (k - 1) + 1` at least.

    Returns:
        Kernels `(C, 1, K, K)`, with the same taps in the middle.

    Source:
        UniRepLKNet, arXiv 2311.15599, section 3.1.
    """
    taps, behind = weight.shape[-1], dilation - 1
    # no slices are written to: a graph of torch.fx would lose them
    spread = F.pad(weight[:, :, :, None, :, None], (0, behind, 0, 0, 0, behind))
    dense = spread.reshape(weight.shape[0], 1, taps * dilation, taps * dilation)
    first = size // 2 - dilation * (taps // 2)
    # of the zeros behind the last tap some may be too many
    last = size - first - taps * dilation
    return F.pad(dense, (first, last, first, last))


def cast_all(residual: bool, x: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Apply the autocast rule of depthwise convolutions: a residual stream keeps its type.

    Under autocast the sums of residual branches are often float32; what a convolution added to such
    a stream would lose in 16 bit, all later layers would miss.
    """
    if not residual:
        return autocast(x, *tensors)
    # the query raises on the meta device
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
        return x, *tensors
    return x, *(t if t is None else t.to(x.dtype) for t in tensors)


def check_conv(x: Tensor, weight: Tensor, bias: Tensor | None, at: Window) -> None:
    """Check what all depthwise convolutions take.

    Raises:
        ValueError: Shapes or types that do not fit together.
    """
    if x.ndim != 4:
        raise ValueError(f"x {tuple(x.shape)} must be a map (B, H, W, C)")
    channels = x.shape[3]
    if weight.shape != (channels, 1, at.size, at.size):
        raise ValueError(f"weight {tuple(weight.shape)} must be (C, 1, K, K) with C = {channels}")
    if at.size % 2 == 0 or at.size < 3 or at.size > LARGEST:
        raise ValueError(f"kernels of {at.size}: they must be odd, from 3 to {LARGEST}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias {tuple(bias.shape)} must be a vector of C = {channels}")
    if at.stride != 1 and (at.stride, at.size) != (2, 3):
        raise ValueError(f"stride={at.stride} of kernels of {at.size}: 1, or 2 for kernels of 3")
    if at.same and at.stride != 2:
        raise ValueError(
            f'same=True needs stride 2, not {at.stride}: else it is the padding of "K // 2"'
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"weight is {weight.dtype} and x {x.dtype}: cast one of them")


def check_border(
    x: Tensor, at: Window, border: Tensor | None, border_size: tuple[int, int]
) -> None:
    """Check the border of a map.

    Raises:
        ValueError: A border that does not fit the map, or one of a strided convolution.
    """
    if border is None:
        return
    if border.shape != (x.shape[3],):
        raise ValueError(f"border {tuple(border.shape)} must be a vector of C = {x.shape[3]}")
    if min(border_size) < 0:
        raise ValueError(f"border_size={border_size} must not be negative")
    if at.stride != 1:
        raise ValueError(f"border needs stride 1, not {at.stride}")
