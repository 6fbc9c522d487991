"""Rotary position encoding of two-dimensional maps (RoFormer, arXiv 2104.09864; RAVLT)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from backbones.ops import rotary_table


@torch.fx.wrap
def table_of_map(x: Tensor, theta: Tensor) -> Tensor:
    """Cosines and sines `(2, H + W, D / 4)` for a map `(B, H, W, C)`, at least in float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else theta.dtype
    frequencies = theta.to(device=x.device, dtype=dtype)
    # more than the longer side needs, but a trace can record a sum, and no comparison
    return rotary_table(frequencies, x.shape[1] + x.shape[2])


class RotaryPosition(nn.Module):
    """Angles by which pairs of channels are turned, row by row and column by column.

    The frequencies fall from 1 to 1e-4 in equal ratios, both ends included. They stay in float32
    whatever the type of the model: rounded ones would misplace far pixels. They are no buffer:
    libraries that fill a model made on the meta device put new memory into buffers, and not all ask
    to have it computed again (DETR of transformers).

    Args:
        head_dim: Channels `D` of a head, a multiple of 4.
        device: Where the frequencies are kept.

    Raises:
        ValueError: A `head_dim` that is no multiple of 4.
    """

    def __init__(self, head_dim: int, device: Any = None) -> None:
        super().__init__()
        if head_dim < 4 or head_dim % 4:
            raise ValueError(f"head_dim={head_dim} must be a multiple of 4 for rotary positions")
        self.head_dim = head_dim
        self.theta = self._frequencies(torch.empty(0, device=device).device)

    def _frequencies(self, device: torch.device) -> Tensor:
        # computed as the official code does: pow of another device may round otherwise
        theta = 1.0 / (10000 ** torch.linspace(0, 1, self.head_dim // 4, device="cpu"))
        # the meta device has no values to move to another one later
        return theta if device.type == "meta" else theta.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryPosition:
        super()._apply(fn, recurse)
        self.theta = self._frequencies(fn(self.theta).device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, H, W, C)`, return its table `(2, H + W, D / 4)` for `apply_rotary`."""
        return table_of_map(x, self.theta)
