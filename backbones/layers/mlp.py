"""The feed forward network of a transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn

from backbones.ops import runs_at_once

from .gelu import Gelu

# tokens whose hidden values stay in the cache of a core; more of them are taken in turns
_TOKENS = 2048


class Mlp(timm.layers.Mlp):
    """timm's `Mlp` with a GELU in place, whose hidden values a CPU does not keep for all tokens.

    Args:
        dim: Width of the map.
        hidden: Width between the linear layers.
        act_layer: Makes the activation.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        act_layer: Callable[..., nn.Module] = Gelu,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(dim, hidden, act_layer=act_layer, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(..., dim)`."""
        if torch.jit.is_scripting():
            return self._feed(x)
        else:
            if not runs_at_once(x) or x.numel() <= 2 * _TOKENS * x.shape[-1]:
                return self._feed(x)
            blocks = x.flatten(0, -2).split(_TOKENS)
            return torch.cat([self._feed(tokens) for tokens in blocks]).unflatten(0, x.shape[:-1])

    def _feed(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
