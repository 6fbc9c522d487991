"""The attentions of BiFormer and the block around each (arXiv 2303.08810, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, Mlp, is_exportable
from torch import Tensor, nn

from backbones.ops import (
    depthwise_conv,
    depthwise_conv_reference,
    route_regions,
    route_regions_reference,
    routing_attention,
    routing_attention_reference,
)

from .fold import fold_layer_norm
from .position_conv import ConvPositionEncoding

_LEPE_SIZE = 5


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
        return torch.sym_max(value, least)


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


def _values(qkv: Tensor, pad: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The values of packed tokens, and of `pad`."""
    start = qkv.shape[3] // 3 * 2
    return qkv[..., start:], None if pad is None else pad[start:]


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
) -> Tensor:
    """Attend to the best regions, and add the LEPE of the values."""
    count, size, edge = _layout(qkv, pad, n_win, lepe_weight.shape[3] // 2)
    regions = route_regions(qkv, topk, count, size, pad)
    x = routing_attention(qkv, regions, num_heads, count, size, pad)
    v, border = _values(qkv, pad)
    return depthwise_conv(v, lepe_weight, lepe_bias, x, border=border, border_size=edge)


@torch.fx.wrap
def _attend_reference(
    qkv: Tensor,
    lepe_weight: Tensor,
    lepe_bias: Tensor | None,
    pad: Tensor | None,
    num_heads: int,
    n_win: int,
    topk: int,
) -> Tensor:
    """Do the same without registered ops."""
    count, size, edge = _layout(qkv, pad, n_win, lepe_weight.shape[3] // 2)
    regions = route_regions_reference(qkv, topk, count, size, pad)
    x = routing_attention_reference(qkv, regions, num_heads, count, size, pad)
    v, border = _values(qkv, pad)
    return depthwise_conv_reference(v, lepe_weight, lepe_bias, x, border=border, border_size=edge)


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
        self.lepe = _lepe(dim, **dd)
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
        qkv, weight, bias, pad = self.qkv(x), self.lepe.weight, self.lepe.bias, self._pad()
        if self.exportable:
            x = _attend_reference(qkv, weight, bias, pad, self.num_heads, self.n_win, self.topk)
        else:
            x = _attend(qkv, weight, bias, pad, self.num_heads, self.n_win, self.topk)
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
        return route_regions(self.qkv(x), self.topk, *self.grid(*x.shape[1:3]), self._pad())

    def fold_norm(self, norm: nn.LayerNorm) -> nn.LayerNorm:
        """Take over weight and bias of the norm before; tokens outside the map keep theirs."""
        if norm.weight is not None and not self.floor_regions:
            self.outside = self.qkv.bias.detach().clone()
        return fold_layer_norm(norm, self.qkv)


class LepeAttention(nn.Module):
    """Multi-head attention over all tokens of a map, plus a local enhancement.

    Scores are scaled by the width of a head, those of `BiLevelRoutingAttention` by that of the map.

    Args:
        dim: Channels of the map.
        num_heads: Heads.
        lepe_on_values: Enhance the values, as in `biformer_stl_nchw`, instead of what comes in.
        device: Where parameters are made.
        dtype: Their type.
    """

    __constants__ = ("exportable",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        lepe_on_values: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.lepe_on_values = lepe_on_values
        self.exportable = is_exportable()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.lepe = _lepe(dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`."""
        batch, height, width, dim = x.shape
        qkv = self.qkv(x)
        parts = qkv.reshape(batch, height * width, 3, self.num_heads, dim // self.num_heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        y = y.transpose(1, 2).reshape(batch, height, width, dim)
        local = qkv[..., 2 * dim :] if self.lepe_on_values else x
        if self.exportable:
            y = depthwise_conv_reference(local, self.lepe.weight, self.lepe.bias, y)
        else:
            y = depthwise_conv(local, self.lepe.weight, self.lepe.bias, y)
        return self.proj(y)

    def fold_norm(self, norm: nn.LayerNorm) -> nn.LayerNorm:
        """Take over weight and bias of the norm before, unless the enhancement needs them too."""
        return fold_layer_norm(norm, self.qkv) if self.lepe_on_values else norm


def _lepe(dim: int, **dd: Any) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, _LEPE_SIZE, padding=_LEPE_SIZE // 2, groups=dim, **dd)


class RoutingBlock(nn.Module):
    """Position encoding, attention and a feed forward network, the latter two with a residual.

    The position encoding computes the norm behind it, from the parameters of `norm1`: this module
    is not called then, nor are its hooks.

    Args:
        dim: Width of the map.
        attention: Makes the attention: `attention(dim, device=, dtype=)`.
        mlp_ratio: Hidden width over width of the feed forward network.
        position_encoding: Whether there is one.
        drop_path: Probability that training drops a branch.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        dim: int,
        attention: Callable[..., BiLevelRoutingAttention | LepeAttention],
        mlp_ratio: int,
        position_encoding: bool = True,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.cpe = ConvPositionEncoding(dim, **dd) if position_encoding else None
        self.norm1 = LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attention(dim, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, mlp_ratio * dim, act_layer=nn.GELU, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`."""
        if self.cpe is None:
            y = self.norm1(x)
        else:
            x, y = self.cpe(x, self.norm1.weight, self.norm1.bias, self.norm1.eps)
        x = x + self.drop_path1(self.attn(y))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    @torch.no_grad()
    def fuse(self) -> RoutingBlock:
        """Fold norm weights into the linear layers; return the block."""
        self.norm1 = self.attn.fold_norm(self.norm1)
        self.norm2 = fold_layer_norm(self.norm2, self.mlp.fc1)
        return self
