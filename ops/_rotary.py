"""Rotary position encoding in two dimensions (RAVLT): channels turn by row and by column.

Channels of a head come in pairs `(2p, 2p + 1)`. With `theta` of `D / 4` frequencies, pair `p` of a
token at row `y` and column `x` is turned by the angle `y * theta[p]` in the first half of the pairs
and by `x * theta[p - D / 4]` in the second:

    (a, b) -> (a cos - b sin, b cos + a sin)

Angles grow with the map, so their table is kept in float32 whatever the type of the map.
"""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor


def rotary_table(theta: Tensor, size: int) -> Tensor:
    """Cosines and sines of the positions along one axis.

    Args:
        theta: Frequencies `(D / 4,)`, in radians per token.
        size: Positions, from 0; at least the longer side of the maps.

    Returns:
        The table `(2, size, D / 4)`, cosines before sines, in float32; in float64 if `theta` is.
    """
    dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
    positions = torch.arange(size, dtype=dtype, device=theta.device)
    radians = positions[:, None] * theta.to(dtype)
    return torch.stack([radians.cos(), radians.sin()])


def apply_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn the heads of a map by the positions of its tokens, in plain, differentiable PyTorch.

    Args:
        x: Map of heads `(B, H, W, heads, D)`, D a multiple of 4.
        rotary: Table of `rotary_table` `(2, S, D / 4)`, S at least `max(H, W)`.

    Returns:
        A map of the shape and the type of `x`; computed in the type of the table if that is wider.

    Raises:
        ValueError: The table is too short, or made for another D.

    Source:
        RAVLT, arXiv 2411.07635; RoFormer, arXiv 2104.09864, section 3.2.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  what stands behind `and` would be scripted
        # a trace sees sizes as tensors
        if not (isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing()):
            check_rotary(rotary, x.shape[1], x.shape[2], x.shape[4])
    cos, sin = angles(rotary, x.shape[1], x.shape[2])
    if torch.jit.is_scripting():
        return turned(x, cos, sin).to(x.dtype)
    else:
        turn = _turned_complex if _is_plain(x) else turned
        return turn(x, cos, sin).to(x.dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of `x` `(..., D)` by cosines and sines `(..., D / 2)`."""
    a, b = x.unflatten(-1, [x.shape[-1] // 2, 2]).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def _turned_complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same as a product of complex numbers, which a CPU computes several times as fast."""
    a, b = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.view_as_real(torch.complex(a, b) * torch.complex(cos, sin)).flatten(-2)


def _is_plain(x: Tensor) -> bool:
    """Whether `x` is computed on a CPU and now: compilers and exporters avoid complex numbers."""
    if isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu"


def angles(rotary: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all pairs of a map, each `(H, W, 1, D / 2)`."""
    rows = rotary[:, :height, None].expand(-1, -1, width, -1)
    columns = rotary[:, None, :width].expand(-1, height, -1, -1)
    pairs = torch.cat([rows, columns], dim=-1)
    return pairs[0].unsqueeze(2), pairs[1].unsqueeze(2)


def check_rotary(rotary: Tensor, height: int, width: int, dim: int) -> None:
    """Raise a ValueError unless `rotary` serves heads of `dim` channels on a map of this size."""
    if dim % 4 or rotary.ndim != 3 or rotary.shape[0] != 2 or rotary.shape[2] != dim // 4:
        raise ValueError(
            f"rotary {tuple(rotary.shape)} must be (2, S, D / 4) for heads of D = {dim} channels, "
            "a multiple of 4: make it with rotary_table(theta, S) of D / 4 frequencies"
        )
    if rotary.shape[1] < height or rotary.shape[1] < width:
        raise ValueError(
            f"rotary has {rotary.shape[1]} positions, the map is {height} x {width}: make it with "
            f"rotary_table(theta, {max(height, width)})"
        )
