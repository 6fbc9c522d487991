"""A large depthwise kernel and the BatchNorm behind it (OverLoCK, arXiv 2502.20087)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .dilated_reparam import DilatedReparamConv
from .fold import batch_norm_affine, fold_output


class LargeKernelConv(nn.Module):
    """A `DilatedReparamConv` and a BatchNorm, which `fuse()` makes one convolution.

    Args:
        dim: Channels.
        kernel_size: Side of the kernel.
        reparam: Make the merged form of the convolution.
        device: Where parameters are made.
        dtype: Their type.
    """

    __constants__ = ("fused",)

    # torch.jit.script stumbles over annotations of a module class
    if TYPE_CHECKING:
        bn: nn.Module

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        reparam: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.fused = False
        self.rep = DilatedReparamConv(dim, kernel_size, reparam, device=device, dtype=dtype)
        self.bn = nn.BatchNorm2d(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """Take and return a map `(B, H, W, dim)`, with another added to the result."""
        if self.fused:
            return self.rep(x, addend)
        y = self.bn(self.rep(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return y if addend is None else y + addend

    @torch.no_grad()
    def fuse(self) -> LargeKernelConv:
        """Merge the kernels and fold the norm into them; return the layer."""
        if isinstance(self.bn, nn.BatchNorm2d):
            conv = self.rep.reparameterize().conv
            fold_output(conv, *batch_norm_affine(self.bn))
            self.bn, self.fused = nn.Identity(), True
        return self


def merge_weights(weights: dict[str, Tensor], prefix: str) -> None:
    """Merge the weights of a `DilatedReparamConv`, if they are those of its first form.

    Args:
        weights: Name -> tensor, changed in place.
        prefix: What the names of the layer begin with.
    """
    parts = {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
    if "bn.weight" not in parts or "conv.weight" not in parts:
        return
    shape = parts["conv.weight"].shape
    layer = DilatedReparamConv(shape[0], shape[-1], device="meta")
    if set(parts) != set(layer.state_dict()):
        return
    layer.load_state_dict(parts, assign=True)
    for key in parts:
        del weights[prefix + key]
    weights |= {prefix + k: v for k, v in layer.reparameterize().state_dict().items()}
