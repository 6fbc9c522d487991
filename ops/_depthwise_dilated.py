"""Dilated depthwise convolutions of maps `(B, H, W, C)`, and their gradients, by what is fastest.

Our kernels know no dilation: where the table chooses them, zeros between the taps make kernels as
large as what these reach. PyTorch's take a dilation, which saves these products; but on a CPU it
computes 9 by 9 taps that are apart more slowly than 17 by 17 in a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _depthwise_pytorch as pytorch
from ._choice import implementation
from ._common import accumulation_dtype
from ._depthwise import Fused, Window, embed_dilated

# taps a side that a CPU convolves faster with zeros between them
_SLOW = 9


class Dilated(NamedTuple):
    """Where a kernel of `size` by `size` taps is put, `dilation` pixels apart."""

    size: int
    dilation: int

    @property
    def reach(self) -> int:
        """Side of the square that the taps are spread over."""
        return self.dilation * (self.size - 1) + 1

    @property
    def pad(self) -> int:
        """Zeros on every side of the map."""
        return self.reach // 2

    def dense(self, weight: Tensor) -> Tensor:
        """Write zeros between the taps."""
        return weight if self.dilation == 1 else embed_dilated(weight, self.dilation, self.reach)


def _conv(x: Tensor, weight: Tensor, at: Dilated) -> Tensor:
    dilation = at.dilation
    if dilation > 1 and at.size >= _SLOW and x.device.type == "cpu":
        weight, dilation = at.dense(weight), 1
    planes = F.conv2d(x.permute(0, 3, 1, 2), weight, None, 1, at.pad, dilation, x.shape[3])
    return planes.permute(0, 2, 3, 1)


def forward(x: Tensor, weight: Tensor, at: Dilated) -> Tensor:
    """Convolve `x` with kernels `(C, 1, k, k)`; the result `(B, H, W, C)` has any strides."""
    run = implementation("forward", x, at.reach, 1)
    if run is pytorch:
        return _conv(x, weight, at)
    return run.forward(x, at.dense(weight), None, None, Window(at.reach), Fused(), "")[0]


def grad_input(dz: Tensor, x: Tensor, weight: Tensor, at: Dilated) -> Tensor:
    """The gradient of `x`, of any strides, from that of the result."""
    run = implementation("grad_input", x, at.reach, 1)
    if run is pytorch:
        return _conv(dz, weight.flip(2, 3), at)
    return run.grad_input(dz, x, at.dense(weight), Window(at.reach), Fused())


def grad_weight(dz: Tensor, x: Tensor, weight: Tensor, at: Dilated) -> Tensor:
    """The gradient of `weight`, perhaps in float32, from that of the result."""
    run = implementation("grad_weight", x, at.reach, 1)
    if run is not pytorch:
        dense = run.grad_weight(dz, x, at.dense(weight), Window(at.reach), Fused())[0]
        return dense[:, :, :: at.dilation, :: at.dilation]
    if x.device.type == "cpu" and at.dilation > 1:
        # of large channels-last maps in bfloat16 PyTorch 2.11 and 2.15 return garbage
        dz, x, weight = (t.to(accumulation_dtype(t.dtype)) for t in (dz, x, weight))
    # autograd does not reach into registered ops
    return torch.ops.aten.convolution_backward(
        dz.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, None,
        [1, 1], [at.pad] * 2, [at.dilation] * 2, False, [0, 0], x.shape[3], [False, True, False],
    )[1]  # fmt: skip
