"""A stage of blocks that take maps with channels last."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models import checkpoint_seq
from torch import Tensor, nn


class ChannelsLastStage(nn.Module):
    """Blocks of one width, after a downsampling if there is one.

    Args:
        downsample: What comes before the blocks, on maps `(B, C, H, W)`.
        blocks: On maps `(B, H, W, C)`.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, in_dim, H, W)`, return the stage's `(B, dim, H, W)`."""
        x = self.downsample(x).permute(0, 2, 3, 1)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)
