"""OverLoCK's block for networks of one's own (arXiv 2502.20087; official `contmix.py`)."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, trunc_normal_
from torch import Tensor, nn

from .affine_scale import AffineScale
from .conv_grn_mlp import ConvGrnMlp
from .fold import fold_layer_norm
from .gated_mixing import GatedMixing
from .position_conv import ConvPositionEncoding


class ContMixBlock(nn.Module):
    """Gated dynamic mixing and a feed forward network, both residual, for any map.

    Stands alone: it takes maps of any size and may replace a block of any network. The map is its
    own context. `num_heads` counts as the official code does, where a head has two halves of its
    own: there are twice as many heads as that, of `dim / num_heads / 4` channels for either kernel.

        block = ContMixBlock(64, num_heads=2)
        y = block(x)    # both (B, 64, H, W)

    Depthwise convolutions compute the norms behind them, from the parameters of `norm1` and
    `norm2`: these modules are not called, nor are their hooks.

    Args:
        dim: Channels, a multiple of `4 * num_heads`.
        kernel_size: Side of the large dynamic kernel, and of the static one beside it: 5 to 17,
            odd.
        smk_size: Side of the small dynamic kernel.
        num_heads: Heads, see above.
        mlp_ratio: Hidden width of the feed forward network over `dim`.
        drop_path: Probability that training drops a branch.
        reparam: Make the merged form of the static kernel.
        channels_last: Take and return maps `(B, H, W, dim)` instead of `(B, dim, H, W)`.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ValueError: A width that does not fit the heads, a large kernel of another size.
    """

    __constants__ = ("channels_last",)

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        smk_size: int = 5,
        num_heads: int = 2,
        mlp_ratio: int = 4,
        drop_path: float = 0.0,
        reparam: bool = False,
        channels_last: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if num_heads < 1 or dim % (4 * num_heads):
            raise ValueError(f"dim={dim} must be a multiple of 4 * num_heads={4 * num_heads}")
        self.channels_last = channels_last
        self.cpe1 = ConvPositionEncoding(dim, **dd)
        self.norm1 = LayerNorm(dim, eps=1e-6, **dd)
        self.mixer = GatedMixing(
            dim, dim, dim, kernel_size, smk_size, 2 * num_heads, True, reparam, **dd
        )
        self.scale1 = AffineScale(dim, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.cpe2 = ConvPositionEncoding(dim, **dd)
        self.norm2 = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = ConvGrnMlp(dim, mlp_ratio * dim, **dd)
        self.scale2 = AffineScale(dim, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        for table in (self.mixer.mixing.table_small, self.mixer.mixing.table_large):
            trunc_normal_(table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, dim, H, W)`, or `(B, H, W, dim)` with `channels_last`."""
        if not self.channels_last:
            x = x.permute(0, 2, 3, 1)
        x, f = self.cpe1(x, self.norm1.weight, self.norm1.bias, self.norm1.eps)
        x = self.scale1(x, self.drop_path1(self.mixer(f, f, f)))
        x, f = self.cpe2(x, self.norm2.weight, self.norm2.bias, self.norm2.eps)
        x = self.scale2(x, self.drop_path2(self.mlp(f)))
        return x if self.channels_last else x.permute(0, 3, 1, 2)

    @torch.no_grad()
    def reparameterize(self) -> ContMixBlock:
        """Merge the static kernels into one, with their running statistics; return the block."""
        self.mixer.lepe.rep.reparameterize()
        return self

    @torch.no_grad()
    def fuse(self) -> ContMixBlock:
        """Fold the second norm's weights and the shifts into linear layers; return the block."""
        self.norm2 = fold_layer_norm(self.norm2, self.mlp.fc1)
        self.scale1.fold_bias(self.mixer.proj)
        self.scale2.fold_bias(self.mlp.fc2)
        return self
