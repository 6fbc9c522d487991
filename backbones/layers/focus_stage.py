"""A stage of OverLoCK's focus network (arXiv 2502.20087)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .focus_block import FocusBlock
from .rep_conv_block import halve


# a trace would keep the size that it saw
@torch.jit.script_if_tracing
def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, (like.shape[2], like.shape[3]), mode="bilinear")


# one call in a graph of torch.fx, which cannot compute sizes
@torch.fx.wrap
def resize_like(x: Tensor, like: Tensor) -> Tensor:
    """Resize a map `(B, C, H', W')` bilinearly to the size of another `(B, D, H, W)`."""
    return _resize(x, like)


class FocusStage(nn.Module):
    """Blocks that refine a map and its context.

    The first stage takes a map alone, and its context is the overview's prior, resized. The next
    takes what a stage returns, and halves map and context each by a convolution.

    Args:
        in_dim: Channels of the map before, without its context; None in the first stage.
        dim: Channels of the map.
        context_dim: Channels of context and prior.
        kernel_size: As for the blocks.
        small_kernel_size: As for the blocks.
        num_heads: As for the blocks.
        rates: Probability that training drops a branch, for each block.
        reparam: As for the blocks.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        in_dim: int | None,
        dim: int,
        context_dim: int,
        kernel_size: int,
        small_kernel_size: int,
        num_heads: int,
        rates: Sequence[float],
        reparam: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        first = in_dim is None
        self.dims = [dim if in_dim is None else in_dim, context_dim]
        self.downsample = None if in_dim is None else halve(in_dim, dim, **dd)
        self.context_downsample = None if first else halve(context_dim, context_dim, **dd)
        sizes = (dim, context_dim, kernel_size, small_kernel_size, num_heads)
        self.blocks = nn.ModuleList(
            FocusBlock(*sizes, first=first and i == 0, drop_path=rate, reparam=reparam, **dd)
            for i, rate in enumerate(rates)
        )

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        """Refine a map.

        Args:
            x: Map `(B, dim, H, W)` in the first stage, else `(B, in_dim + context_dim, H, W)`.
            prior: Map `(B, context_dim, H', W')` of the overview.

        Returns:
            The stage's map with its context, `(B, dim + context_dim, H, W)`, or of half the size.
        """
        if self.downsample is None or self.context_downsample is None:
            prior = resize_like(prior, x)
            x = torch.cat([x, prior], 1)
        else:
            x, context = x.split(self.dims, 1)
            x = torch.cat([self.downsample(x), self.context_downsample(context)], 1)
        x, prior = x.permute(0, 2, 3, 1), prior.permute(0, 2, 3, 1)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, prior, use_reentrant=False)
            else:
                x = block(x, prior)
        return x.permute(0, 3, 1, 2)
