"""Context mixing: dynamic kernels generated from a context (OverLoCK, arXiv 2502.20087)."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import is_exportable
from torch import Tensor, nn

from backbones.ops import (
    adaptive_average,
    adaptive_average_reference,
    dynamic_mixing,
    dynamic_mixing_reference,
)
from backbones.ops._neighborhood import own_slots

from .linear_norm import LinearNorm


def enlarged(height: int, width: int, least: int) -> tuple[int, int]:
    """The size to which a map with a side shorter than `least` is resized.

    The official sizes, products of floating point numbers rounded down, are kept to the digit.

    Args:
        height: Rows of the map.
        width: Columns of the map.
        least: What the shorter side becomes.
    """
    shorter, longer = _range(height, width)
    # integers, which a graph for all sizes can hold, come to the same here
    if least < 15 and longer < 9 * shorter:
        return least * height // shorter, least * width // shorter
    scale = least / shorter
    return max(int(scale * height), least), max(int(scale * width), least)


def _range(height: int, width: int) -> tuple[int, int]:
    """The shorter and the longer side."""
    if torch.jit.is_scripting():
        return min(height, width), max(height, width)
    else:
        # a comparison of symbols would be one more condition of a compiled graph
        shorter, longer = torch.sym_min(height, width), torch.sym_max(height, width)
        return cast(int, shorter), cast(int, longer)


def _fits(height: int, width: int, least: int) -> bool:
    return _range(height, width)[0] >= least


# a trace would keep the sizes that it saw
@torch.jit.script_if_tracing
def _resize(x: Tensor, least: int) -> Tensor:
    height, width = x.shape[1], x.shape[2]
    if _fits(height, width, least):
        return x
    size = enlarged(height, width, least)
    return F.interpolate(x.permute(0, 3, 1, 2), size, mode="bilinear").permute(0, 2, 3, 1)


@torch.jit.script_if_tracing
def _restore(x: Tensor, like: Tensor, least: int, plain: bool) -> Tensor:
    height, width = like.shape[1], like.shape[2]
    if _fits(height, width, least):
        return x
    if plain:
        return adaptive_average_reference(x, height, width)
    return adaptive_average(x, height, width)


# one call each in a graph of torch.fx, which cannot compute sizes
@torch.fx.wrap
def enlarge(x: Tensor, least: int) -> Tensor:
    """Resize a map `(B, H, W, C)` bilinearly, if a side is shorter than `least`."""
    return _resize(x, least)


@torch.fx.wrap
def restore(x: Tensor, like: Tensor, least: int, plain: bool) -> Tensor:
    """Average what `enlarge` has resized to the size of the map before; `plain` without ops."""
    return _restore(x, like, least, plain)


def _positions(table: Tensor, height: int, width: int) -> Tensor:
    """What a table of relative positions adds to the logits of every pixel `(G, H, W, K * K)`."""
    size = (table.shape[-1] + 1) // 2
    slots = torch.arange(size, device=table.device)
    rows, cols = (
        slots - own_slots(length, size, device=table.device)[:, None] + size - 1
        for length in (height, width)
    )
    return table[:, rows[:, None, :, None], cols[None, :, None, :]].flatten(3)


class ContextMixing(nn.Module):
    """Mix neighbors of every pixel by kernels generated from its affinity to a context (ContMix).

    Queries meet the keys of 7x7 regions of the context; a linear layer turns the affinities into
    the weights of two kernels for every pixel and head, a small one and a large one, which softmax
    normalises. Either mixes half of the channels of the values. Near borders windows are shifted
    inside. Maps with a side shorter than the large kernel are resized before and averaged after.

    Args:
        dim: Channels of queries' map and values.
        context_dim: Channels of the context.
        kernel_size: Side of the large kernel.
        small_kernel_size: Side of the small kernel.
        num_heads: Heads; a head has `dim / num_heads / 2` channels of either half.
        value_proj: Project the values.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ValueError: A width that does not fit the heads.
    """

    __constants__ = ("exportable",)

    def __init__(
        self,
        dim: int,
        context_dim: int,
        kernel_size: int,
        small_kernel_size: int,
        num_heads: int,
        value_proj: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % (2 * num_heads):
            raise ValueError(f"dim={dim} must be a multiple of 2 * num_heads={2 * num_heads}")
        dd = {"device": device, "dtype": dtype}
        self.exportable = is_exportable()
        self.num_heads, self.kernel_size = num_heads, kernel_size
        self.small_kernel_size = small_kernel_size
        self.head_dim = dim // num_heads // 2
        self.query = LinearNorm(dim, dim // 2, **dd)
        self.key = LinearNorm(context_dim, dim // 2, **dd)
        self.value = LinearNorm(dim, dim, **dd) if value_proj else nn.Identity()
        slots = small_kernel_size**2 + kernel_size**2
        self.kernel_proj = nn.Linear(7 * 7, slots, **dd)
        small, large = (2 * k - 1 for k in (small_kernel_size, kernel_size))
        self.table_small = nn.Parameter(torch.zeros(num_heads, small, small, **dd))
        self.table_large = nn.Parameter(torch.zeros(num_heads, large, large, **dd))

    def forward(self, x: Tensor, context: Tensor, value: Tensor) -> Tensor:
        """Mix a map.

        Args:
            x: Map `(B, H, W, dim)` that the queries come from.
            context: Map `(B, H, W, context_dim)` that the keys come from.
            value: Map `(B, H, W, dim)` that is mixed.

        Returns:
            A map `(B, H, W, dim)`.
        """
        query = self.query(enlarge(x, self.kernel_size))
        kernel = self.kernels(enlarge(context, self.kernel_size))
        values = self.value(enlarge(value, self.kernel_size))
        bias, small, large = self.kernel_proj.bias, self.table_small, self.table_large
        if self.exportable:
            mixed = dynamic_mixing_reference(query, kernel, values, bias, small, large)
        else:
            mixed = dynamic_mixing(query, kernel, values, bias, small, large)
        return restore(mixed, value, self.kernel_size, self.exportable)

    def kernels(self, context: Tensor) -> Tensor:
        """What turns the queries of a head into weights of kernels, from a context.

        Args:
            context: Map `(B, H, W, context_dim)`.

        Returns:
            Keys times the weights of `kernel_proj`, scaled, `(B, num_heads, D, slots)`, with the
            slots of the small kernel first.
        """
        if self.exportable:
            regions = adaptive_average_reference(context, 7, 7)
        else:
            regions = adaptive_average(context, 7, 7)
        keys = self.key(regions).flatten(1, 2)
        heads = keys.unflatten(2, [self.num_heads, self.head_dim]).permute(0, 2, 3, 1)
        # by the channels of both halves
        return (heads * (2 * self.head_dim) ** -0.5) @ self.kernel_proj.weight.t()

    @torch.jit.ignore
    def attention(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """The kernels of every pixel, for drawing; slots count from the start of a window.

        Args:
            x: Map `(B, H, W, dim)` that the queries come from.
            context: Map `(B, H, W, context_dim)` that the keys come from.

        Returns:
            Weights of the small kernel `(B, num_heads, H, W, small_kernel_size**2)` and of the
            large one, of sum one; of a map resized as for mixing.
        """
        x, context = enlarge(x, self.kernel_size), enlarge(context, self.kernel_size)
        query = self.query(x).unflatten(-1, [self.num_heads, self.head_dim])
        logits = torch.einsum("bhwgd,bgds->bghws", query, self.kernels(context))
        logits = logits + self.kernel_proj.bias
        sizes = self.small_kernel_size, self.kernel_size
        parts = logits.split([k * k for k in sizes], -1)
        tables = self.table_small, self.table_large
        small, large = (
            (part + _positions(table, x.shape[1], x.shape[2])).softmax(-1)
            for part, table in zip(parts, tables, strict=True)
        )
        return small, large
