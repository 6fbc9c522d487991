"""What reads OverLoCK's overview beside the focus (arXiv 2502.20087)."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import LayerNorm2d, trunc_normal_
from torch import Tensor, nn

from .affine_scale import AffineScale
from .fold import batch_norm_affine, fold_input


class AuxiliaryHead(nn.Module):
    """BatchNorm, average pooling and a linear classifier.

    Args:
        dim: Channels of the map.
        num_classes: Classes, 0 for no classifier.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(self, dim: int, num_classes: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.bn: nn.Module = nn.BatchNorm2d(dim, device=device, dtype=dtype)
        self.fc = self._classifier(dim, num_classes, device=device, dtype=dtype)
        self.dim = dim

    def _classifier(self, dim: int, num_classes: int, **dd: Any) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        layer = nn.Linear(dim, num_classes, **dd)
        trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
        return layer

    def reset(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one.

        Args:
            num_classes: Classes, 0 for no classifier.
        """
        self.fc = self._classifier(self.dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, dim, H, W)`, return logits `(B, num_classes)`."""
        return self.fc(self.bn(x).mean((2, 3)))

    @torch.no_grad()
    def fuse(self) -> AuxiliaryHead:
        """Fold the norm into the classifier, if there is one; return the layer."""
        if isinstance(self.bn, nn.BatchNorm2d) and isinstance(self.fc, nn.Linear):
            fold_input(self.fc, *batch_norm_affine(self.bn))
            self.bn = nn.Identity()
        return self


class OverviewSkip(nn.Module):
    """A LayerNorm, a linear layer and a scale, whose result is added to the last map.

    Args:
        in_dim: Channels of the overview.
        dim: Channels of the last map.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(self, in_dim: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = LayerNorm2d(in_dim, eps=1e-6, **dd)
        self.proj = nn.Linear(in_dim, dim, **dd)
        self.scale = AffineScale(dim, 1e-5, **dd)

    def forward(self, overview: Tensor, x: Tensor) -> Tensor:
        """Take the overview `(B, in_dim, H, W)` and a map `(B, dim, H, W)`, return their sum."""
        skip = self.proj(self.norm(overview).permute(0, 2, 3, 1))
        return self.scale(skip, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
