"""Bi-level routing attention (BiFormer, arXiv 2303.08810, section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.fx
from timm.layers import is_exportable
from torch import Tensor, nn

from backbones.ops import (
    depthwise_conv,
    depthwise_conv_reference,
    reference_in_use,
    route_regions,
    route_regions_reference,
    routing_attention,
    routing_attention_reference,
)

from .channel_slice import with_slice
from .fold import fold_layer_norm
from .lepe_attention import lepe


def region_grid(height: int, width: int, n_win: int, floor: bool) -> tuple[int, int, int, int]:
    """Divide a map into regions as `BiLevelRoutingAttention` does.

    Args:
        height: Rows of the map.
        width: Columns of the map.
        n_win: Regions per side, about.
        floor: Round the sides of a region down.

    Returns:
        Rows and columns of regions, rows and columns of tokens in each.
    """
    if not floor:
        return n_win, n_win, (height + n_win - 1) // n_win, (width + n_win - 1) // n_win
    h, w = _at_least(height // n_win, 1), _at_least(width // n_win, 1)
    rows, cols = (height + h - 1) // h, (width + w - 1) // w
    return _at_least(rows, n_win), _at_least(cols, n_win), h, w


def _at_least(value: int, least: int) -> int:
    if torch.jit.is_scripting():
        return max(value, least)
    else:
        # a trace sees sizes as tensors
        if isinstance(value, Tensor):
            return value.clamp(min=least)
        return cast(int, torch.sym_max(value, least))


def _layout(
    qkv: Tensor, pad: Tensor | None, n_win: int, reach: int
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Counts and sizes of regions, and how far `pad` is seen; without it sizes are floored."""
    height, width = qkv.shape[1], qkv.shape[2]
    rows, cols, h, w = region_grid(height, width, n_win, pad is None)
    edge = (0, 0)
    if pad is not None:
        bottom, right = rows * h - height, cols * w - width
        # what a convolution sees of it from within the map
        edge = (bottom - _at_least(bottom - reach, 0), right - _at_least(right - reach, 0))
    return (rows, cols), (h, w), edge


# a trace would keep the sizes of regions that it saw
@torch.jit.script_if_tracing
def _attend_ops(
    qkv: Tensor,
    lepe_weight: Tensor,
    lepe_bias: Tensor | None,
    pad: Tensor | None,
    num_heads: int,
    n_win: int,
    topk: int,
) -> Tensor:
    """Attend to the best regions, and add the LEPE of the values, by registered ops."""
    count, size, edge = _layout(qkv, pad, n_win, lepe_weight.shape[3] // 2)
    regions = route_regions(qkv, topk, count, size, pad)
    start = qkv.shape[3] // 3 * 2
    qkv, v = with_slice(qkv, 3, start, qkv.shape[3] - start)
    x = routing_attention(qkv, regions, num_heads, count, size, pad)
    border = None if pad is None else pad[start:]
    return depthwise_conv(v, lepe_weight, lepe_bias, x, border=border, border_size=edge)


def _attend_reference(
    qkv: Tensor,
    lepe_weight: Tensor,
    lepe_bias: Tensor | None,
    pad: Tensor | None,
    num_heads: int,
    n_win: int,
    topk: int,
) -> Tensor:
    """Do the same in plain, differentiable PyTorch."""
    count, size, edge = _layout(qkv, pad, n_win, lepe_weight.shape[3] // 2)
    regions = route_regions_reference(qkv, topk, count, size, pad)
    x = routing_attention_reference(qkv, regions, num_heads, count, size, pad)
    start = qkv.shape[3] // 3 * 2
    v, border = qkv[..., start:], None if pad is None else pad[start:]
    return depthwise_conv_reference(v, lepe_weight, lepe_bias, x, border=border, border_size=edge)


# one call in a graph of torch.fx, which cannot compute sizes of regions
@torch.fx.wrap
def _attend(
    qkv: Tensor,
    lepe_weight: Tensor,
    lepe_bias: Tensor | None,
    pad: Tensor | None,
    num_heads: int,
    n_win: int,
    topk: int,
    exportable: bool,
) -> Tensor:
    if torch.jit.is_scripting():
        return _attend_ops(qkv, lepe_weight, lepe_bias, pad, num_heads, n_win, topk)
    else:
        attend = _attend_reference if exportable or reference_in_use() else _attend_ops
        return attend(qkv, lepe_weight, lepe_bias, pad, num_heads, n_win, topk)


class BiLevelRoutingAttention(nn.Module):
    """Attention of every region of a map to the regions it fits best, plus a local enhancement.

    Stands alone: it takes maps of any size and may replace an attention or a convolution of any
    network. The map is cut into `n_win` by `n_win` regions. Each attends, with all heads, to the
    tokens of `topk` regions: those whose mean key has the largest product with its mean query. A
    depthwise 5x5 convolution of the values (LEPE) is added.

        attention = BiLevelRoutingAttention(128, num_heads=4, channels_first=True)
        y = attention(x)    # both (B, 128, H, W)

    The cost of a map of N tokens is that of `topk * N / n_win**2` keys per query: larger maps want
    larger `n_win` (the authors take 7 at 224x224, 8 at 512x512, 16 for detection). Choices have no
    gradient.

    A map that the regions do not fill is continued below and to the right, in one of two ways, and
    its tokens are not masked: others attend to them.

    - As in all released models but one, regions have `ceil(H / n_win)` rows, and tokens outside the
      map have the bias of `qkv` as query, key and value, since zeros are put there before `qkv`.
    - With `floor_regions`, as in `biformer_stl_nchw`, regions have `floor(H / n_win)` rows, at
      least 1, and there may be more than `n_win` per side; tokens outside have keys and values of
      zeros and do not count in the means.

    Both are the same where `n_win` divides the sizes.

    Args:
        dim: Channels of the map.
        num_heads: Heads.
        n_win: Regions per side.
        topk: Regions that a region attends to.
        floor_regions: See above.
        channels_first: Take and return maps `(B, dim, H, W)` instead of `(B, H, W, dim)`.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ValueError: Heads that do not divide the channels, more choices than regions.
    """

    __constants__ = ("exportable",)

    # torch.jit.script stumbles over annotations of a module class
    if TYPE_CHECKING:
        outside: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        n_win: int = 7,
        topk: int = 4,
        floor_regions: bool = False,
        channels_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        if not 1 <= topk <= n_win**2:
            raise ValueError(
                f"topk={topk} must be from 1 to n_win**2 = {n_win**2}: there are no more regions"
            )
        self.num_heads = num_heads
        self.n_win = n_win
        self.topk = topk
        self.floor_regions = floor_regions
        self.channels_first = channels_first
        self.exportable = is_exportable()
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.lepe = lepe(dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.register_buffer("outside", None)

    def _pad(self) -> Tensor | None:
        """What tokens outside the map are, None for zeros."""
        if self.floor_regions:
            return None
        return self.qkv.bias if self.outside is None else self.outside

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`, or `(B, dim, H, W)` with `channels_first`."""
        if self.channels_first:
            x = x.permute(0, 2, 3, 1)
        x = _attend(
            self.qkv(x),
            self.lepe.weight,
            self.lepe.bias,
            self._pad(),
            self.num_heads,
            self.n_win,
            self.topk,
            self.exportable,
        )
        x = self.proj(x)
        return x.permute(0, 3, 1, 2) if self.channels_first else x

    @torch.jit.ignore
    def grid(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """How a map of this size is cut: rows and columns of regions, and of tokens in each.

        Args:
            height: Rows of the map.
            width: Columns of the map.
        """
        rows, cols, h, w = region_grid(height, width, self.n_win, self.floor_regions)
        return (rows, cols), (h, w)

    @torch.jit.ignore
    def route(self, x: Tensor) -> Tensor:
        """The regions that every region of a map attends to.

        Args:
            x: The map, as `forward` takes it.

        Returns:
            Indices `(B, R, topk)`, best first; region `row * cols + col` of the `R = rows * cols`
            that `grid` gives.
        """
        if self.channels_first:
            x = x.permute(0, 2, 3, 1)
        num_regions, region_size = self.grid(x.shape[1], x.shape[2])
        return route_regions(self.qkv(x), self.topk, num_regions, region_size, self._pad())

    def fold_norm(self, norm: nn.LayerNorm) -> nn.LayerNorm:
        """Take over weight and bias of the norm before; tokens outside the map keep theirs."""
        if norm.weight is not None and not self.floor_regions:
            self.outside = self.qkv.bias.detach().clone()
        return fold_layer_norm(norm, self.qkv)
