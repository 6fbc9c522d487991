"""Attention of every pixel to a window around it (MSA-Conv, Neighborhood Attention)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import is_exportable
from torch import Tensor, nn

from backbones.ops import neighborhood_attention, neighborhood_attention_reference
from backbones.ops._neighborhood import Pair, check_kernel, pair

from .fold import fold_layer_norm


class NeighborhoodAttention(nn.Module):
    """Multi-head attention of every pixel of a map to a window around it.

    It has no positions but those that the zeros around the map give at its border. For maps of any
    size, those smaller than a window included; with `boundary="clamp"` of the size of a window with
    its dilation at least.

    Args:
        dim: Width of the map.
        num_heads: Heads; `num_heads = dim` attends channel by channel.
        kernel_size: Rows and columns of a window, odd; one number for both.
        dilation: Distance of its rows and columns; one number for both.
        shifts: Up to four pairs `(rows, columns)` that the heads use in turn: a head attends on the
            map rolled by minus its shift.
        boundary: "zero" for windows that reach over the border, where scores and values are zeros,
            as in MSA-Conv; "clamp" for windows that are shifted inside, as in Neighborhood
            Attention. See `backbones.ops.neighborhood_attention`.
        proj: Whether a linear layer follows.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ValueError: A width that the heads do not divide, or a kernel that is not odd.

    Example:
        >>> NeighborhoodAttention(64, num_heads=2)(torch.randn(2, 25, 38, 64)).shape
        torch.Size([2, 25, 38, 64])
    """

    __constants__ = ("exportable",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Pair = 7,
        dilation: int | Pair = 1,
        shifts: Sequence[Pair] = (),
        boundary: str = "zero",
        proj: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.kernel_size, self.dilation = pair(kernel_size), pair(dilation)
        check_kernel("kernel_size", self.kernel_size, self.dilation, least=1)
        # torch.jit.script knows no type of an empty list
        self.shifts = [(int(y), int(x)) for y, x in shifts] or None
        self.boundary = boundary
        self.exportable = is_exportable()
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd) if proj else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`."""
        return self.proj(self.attend(self.qkv(x)))

    def attend(self, qkv: Tensor) -> Tensor:
        """Take queries, keys and values `(B, H, W, 3 * dim)`, return `(B, H, W, dim)`."""
        heads, size, steps = self.num_heads, self.kernel_size, self.dilation
        if self.exportable:
            return neighborhood_attention_reference(
                qkv, heads, size, steps, None, self.boundary, self.shifts
            )
        return neighborhood_attention(qkv, heads, size, steps, None, self.boundary, self.shifts)

    def fold_norm(self, norm: nn.LayerNorm) -> nn.LayerNorm:
        """Take over weight and bias of the norm before."""
        return fold_layer_norm(norm, self.qkv)

    def extra_repr(self) -> str:
        """Show the windows when the model is printed."""
        return (
            f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, "
            f"dilation={self.dilation}, shifts={self.shifts}, boundary={self.boundary!r}"
        )
