"""A linear layer of a map with channels last, and its BatchNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .fold import batch_norm_affine, fold_output


class LinearNorm(nn.Module):
    """A linear layer without bias, and BatchNorm over all pixels.

    `fuse()` makes them one linear layer.

    Args:
        in_features: Input channels.
        out_features: Output channels.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self, in_features: int, out_features: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.linear = nn.Linear(in_features, out_features, bias=False, **dd)
        self.bn = nn.BatchNorm2d(out_features, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, H, W, in_features)`, return `(B, H, W, out_features)`."""
        return self.bn(self.linear(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Return one linear layer with the running statistics folded in."""
        return fold_output(self.linear, *batch_norm_affine(self.bn))
