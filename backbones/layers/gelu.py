"""GELU that writes over what it reads where autograd does not record on a CPU.

Both are for activations that nothing else reads, such as those between two linear layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.ops import gelu_tanh, runs_at_once


class Gelu(nn.GELU):
    """GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a tensor of any shape."""
        if torch.jit.is_scripting():
            return F.gelu(x)
        else:
            return torch.ops.aten.gelu_(x) if runs_at_once(x) else F.gelu(x)


class GeluTanh(nn.Module):
    """GELU approximated by tanh, as TensorFlow's models have it."""

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a tensor of any shape."""
        return gelu_tanh(x, inplace=True)
