"""GELU by tanh, as TensorFlow's models have it."""

from __future__ import annotations

import torch.fx
from torch import Tensor, nn

from backbones.ops import gelu_tanh

# one call in a graph of torch.fx, which cannot ask for a device
torch.fx.wrap("gelu_tanh")


class GeluTanh(nn.Module):
    """GELU approximated by tanh, in place where autograd does not record on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a tensor of any shape."""
        return gelu_tanh(x, inplace=True)
