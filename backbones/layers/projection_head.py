"""A classifier behind a wider projection of the map."""

from __future__ import annotations

from typing import Any

from timm.layers import SelectAdaptivePool2d, trunc_normal_
from torch import Tensor, nn

from .conv_norm import ConvNormAct


class ProjectionHead(nn.Module):
    """A 1x1 convolution with BatchNorm and SiLU, then pooling and a linear classifier.

    Args:
        in_features: Channels of the map.
        num_classes: Classes, 0 for no classifier.
        hidden: Channels after the convolution.
        pool_type: timm's name of the pooling, "" for none.
        drop_rate: Dropout before the classifier.
        bias: Whether the convolution has a bias.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.hidden = hidden
        self.proj = ConvNormAct(in_features, hidden, 1, act_layer=nn.SiLU, bias=bias, **dd)
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        self.drop = nn.Dropout(drop_rate)
        self.fc = self._classifier(num_classes, **dd)

    def _classifier(self, num_classes: int, **dd: Any) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        layer = nn.Linear(self.hidden, num_classes, **dd)
        trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
        return layer

    def reset(self, num_classes: int, pool_type: str) -> None:
        """Replace pooling and classifier, and keep the projection.

        Args:
            num_classes: Classes, 0 for no classifier.
            pool_type: timm's name of the pooling, "" for none.
        """
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        self.fc = self._classifier(num_classes)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Take a map `(B, in_features, H, W)`, return logits, or what the classifier takes."""
        x = self.drop(self.global_pool(self.proj(x)))
        return x if pre_logits else self.fc(x)
