"""The gated dynamic spatial aggregator of OverLoCK (arXiv 2502.20087, section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .context_mixing import ContextMixing
from .fold import batch_norm_affine, fold_input
from .large_kernel import LargeKernelConv
from .linear_norm import LinearNorm
from .rep_conv_block import squeeze_excite


class GatedMixing(nn.Module):
    """Dynamic mixing of a map beside a static large kernel, with squeeze-excite and a gate.

    Args:
        dim: Channels of the map that is mixed.
        context_dim: Channels of the map that the keys come from.
        out_dim: Channels of the result.
        kernel_size: Side of the large dynamic kernel, and of the static one.
        small_kernel_size: Side of the small dynamic kernel.
        num_heads: Heads of the dynamic mixing.
        value_proj: Project the values.
        reparam: Make the merged form of the static kernel.
        device: Where parameters are made.
        dtype: Their type.
    """

    # torch.jit.script stumbles over annotations of a module class
    if TYPE_CHECKING:
        norm: nn.Module

    def __init__(
        self,
        dim: int,
        context_dim: int,
        out_dim: int,
        kernel_size: int,
        small_kernel_size: int,
        num_heads: int,
        value_proj: bool = False,
        reparam: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.gate = LinearNorm(dim, dim, **dd)
        self.lepe = LargeKernelConv(dim, kernel_size, reparam, **dd)
        self.mixing = ContextMixing(
            dim, context_dim, kernel_size, small_kernel_size, num_heads, value_proj, **dd
        )
        self.out = LinearNorm(dim, dim, **dd)
        self.se = squeeze_excite(dim, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.proj = nn.Linear(dim, out_dim, **dd)

    def forward(self, x: Tensor, context: Tensor, y: Tensor) -> Tensor:
        """Mix a map.

        Args:
            x: Map `(B, H, W, dim)` that the queries come from.
            context: Map `(B, H, W, context_dim)` that the keys come from.
            y: Map `(B, H, W, dim)` that is mixed, and gates.

        Returns:
            A map `(B, H, W, out_dim)`.
        """
        z = self.lepe(y, self.out(self.mixing(x, context, y)))
        z = self.se(z.permute(0, 3, 1, 2)) * F.silu(self.gate(y)).permute(0, 3, 1, 2)
        return self.proj(self.norm(z).permute(0, 2, 3, 1))

    @torch.no_grad()
    def fuse(self) -> GatedMixing:
        """Fold the last norm into the projection; return the layer."""
        if isinstance(self.norm, nn.BatchNorm2d):
            fold_input(self.proj, *batch_norm_affine(self.norm))
            self.norm = nn.Identity()
        return self
