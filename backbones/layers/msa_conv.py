"""MSA-Conv's layer, a convolution whose input has attended to its neighbors.

Paper: Zhang et al., "TiC: Exploring Vision Transformer in Convolution", 2023, arXiv 2310.04134.
Official code: https://github.com/zs670980918/MSA-Conv (without a licence; this is written from a
description of what it computes). Names of parameters are the official ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import is_exportable
from torch import Tensor, nn

from backbones.ops import neighborhood_attention, neighborhood_attention_reference
from backbones.ops._neighborhood import check_kernel


class MSAConv2d(nn.Module):
    """The official `MSA_Conv_2d`: attention within windows, a residual, a convolution, a ReLU.

    One head attends with all channels; slots of a window outside the map have score and value 0.
    The convolution has no bias and no dilation. The official state dict loads as it is.

    In training, and only if `attn_drop` is not 0, weights of the windows are dropped at random.
    That runs in plain PyTorch and keeps `kernel_size ** 2` weights of every pixel; `attn_drop=0`
    trains on the fused op, whose memory does not depend on the window.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        kernel_size: Side of the windows and of the convolution's kernel, odd.
        stride: Stride of the convolution.
        padding: Zeros around the convolution's input; 1 whatever the kernel, as the official layer.
        dilation: Distance of the slots of a window.
        attn_drop: Probability that training drops a weight of the attention.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ValueError: A kernel that is not odd, or a probability outside 0..1.

    Example:
        >>> MSAConv2d(16, 24, kernel_size=3, stride=2)(torch.randn(2, 16, 11, 12)).shape
        torch.Size([2, 24, 6, 6])
    """

    __constants__ = ("exportable",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 1,
        dilation: int = 1,
        attn_drop: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_kernel("kernel_size", (kernel_size, kernel_size), (dilation, dilation), least=1)
        if not 0 <= attn_drop <= 1:
            raise ValueError(f"attn_drop={attn_drop} must be a probability, in 0..1")
        dd = {"device": device, "dtype": dtype}
        self.kernel_size, self.dilation = kernel_size, dilation
        self.attn_drop = attn_drop
        self.exportable = is_exportable()
        self.qkv_conv = nn.Conv2d(in_channels, 3 * in_channels, 1, **dd)
        self.mlp = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, bias=False, **dd
        )

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, in_channels, H, W)`, return `(B, out_channels, H', W')`."""
        return F.relu(self.mlp(x + self._attend(self.qkv_conv(x))))

    def _attend(self, qkv: Tensor) -> Tensor:
        """Take queries, keys and values `(B, 3 * in_channels, H, W)`, return a third of it."""
        if self.training and self.attn_drop > 0.0:
            return self._attend_dropping(qkv)
        qkv = qkv.permute(0, 2, 3, 1)
        if self.exportable:
            out = neighborhood_attention_reference(qkv, 1, self.kernel_size, self.dilation)
        else:
            out = neighborhood_attention(qkv, 1, self.kernel_size, self.dilation)
        return out.permute(0, 3, 1, 2)

    def _attend_dropping(self, qkv: Tensor) -> Tensor:
        """The same with dropout, slot by slot: weights `(B, slots, H, W)` are kept, windows not."""
        q, k, v = qkv.chunk(3, dim=1)
        q = q * q.shape[1] ** -0.5
        scores = torch.stack([(q * key).sum(1) for key in self._slots(k)], dim=1)
        weights = F.dropout(scores.softmax(dim=1), self.attn_drop).unbind(1)
        out = torch.zeros_like(q)
        for weight, value in zip(weights, self._slots(v)):  # noqa: B905
            out = out + weight.unsqueeze(1) * value
        return out

    def _slots(self, x: Tensor) -> list[Tensor]:
        """What every slot of the windows sees of a map: views `(B, C, H, W)` of it, padded."""
        size, step, height, width = self.kernel_size, self.dilation, x.shape[2], x.shape[3]
        reach = step * (size // 2)
        x = F.pad(x, (reach, reach, reach, reach))
        found: list[Tensor] = []
        for top in range(0, size * step, step):
            for left in range(0, size * step, step):
                found.append(x[:, :, top : top + height, left : left + width])
        return found

    def extra_repr(self) -> str:
        """Show the windows when the model is printed."""
        return (
            f"kernel_size={self.kernel_size}, dilation={self.dilation}, attn_drop={self.attn_drop}"
        )
