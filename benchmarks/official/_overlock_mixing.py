"""OverLoCK's context mixing in the official order of operations, without NATTEN."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._overlock_parts import Linear2d, conv_norm


def mix_windows(weights: Tensor, value: Tensor, size: int) -> Tensor:
    """Sum windows that never leave the map, as `na2d_av` of NATTEN 0.17 does, by copying them.

    Windows that lie in the map are unfolded, and those of its border repeated.

    Args:
        weights: Of every slot `(B, G, H, W, size * size)`.
        value: Values `(B, G, H, W, D)`.
        size: Side of the windows.

    Returns:
        The sums `(B, G, H, W, D)`.
    """
    _, heads, height, width, _ = value.shape
    planes = value.permute(0, 1, 4, 2, 3).flatten(1, 2)
    windows = F.unfold(planes, size)
    windows = windows.unflatten(2, (height - size + 1, width - size + 1))
    windows = F.pad(windows, (size // 2,) * 4, mode="replicate")
    windows = windows.unflatten(1, (heads, -1, size * size))
    return torch.einsum("bghwk,bgdkhw->bghwd", weights, windows)


def positions(table: Tensor, height: int, width: int) -> Tensor:
    """What a table of relative positions `(G, 2K - 1, 2K - 1)` adds: `(G, H, W, K * K)`.

    Indices are made on the CPU in every call, as in the official code.
    """
    side = table.shape[-1]
    size = (side + 1) // 2
    rows, cols = (_offsets(length, size) for length in (height, width))
    index = rows[:, None, :, None] * side + cols[None, :, None, :]
    found = table.flatten(1)[:, index.flatten().to(table.device)]
    return found.reshape(-1, height, width, size * size)


def _offsets(length: int, size: int) -> Tensor:
    """Row, or column, of the table for every position and slot `(length, size)`."""
    edge = size // 2
    middle = torch.full((length - 2 * edge,), edge)
    own = torch.cat([torch.arange(edge), middle, torch.arange(edge + 1, size)])
    return torch.arange(size) - own[:, None] + size - 1


class ContextMixing(nn.Module):
    """Kernels for every pixel from its affinity to 7x7 regions of a context, and their use."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.heads, self.sizes = ours.num_heads, [ours.small_kernel_size, ours.kernel_size]
        self.query, self.key = conv_norm(ours.query), conv_norm(ours.key)
        self.kernel_proj = Linear2d(ours.kernel_proj)
        tables = copy.deepcopy([ours.table_small, ours.table_large])
        self.table_small, self.table_large = tables

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        """Mix a map.

        Args:
            f: Features and context `(B, C + C_context, H, W)`.
            y: Map `(B, C, H, W)` to mix.

        Returns:
            A map like `y`.
        """
        true, least = y.shape[2:], self.sizes[1]
        if min(true) < least:
            size = _enlarged(*true, least)
            y, f = (F.interpolate(x, size, mode="bilinear") for x in (y, f))
        z = self._mix(f, y)
        return z if z.shape[2:] == true else F.adaptive_avg_pool2d(z, true)

    def _mix(self, f: Tensor, y: Tensor) -> Tensor:
        height, width = y.shape[2:]
        values = y.unflatten(1, (2, self.heads, -1)).permute(1, 0, 2, 4, 5, 3)
        logits = self._logits(f, y.shape[1]).split([size * size for size in self.sizes], -1)
        tables, halves = (self.table_small, self.table_large), []
        for part, table, value, size in zip(logits, tables, values, self.sizes, strict=True):
            weights = (part + positions(table, height, width)).softmax(-1)
            halves.append(mix_windows(weights, value, size))
        return torch.stack(halves, 1).permute(0, 1, 2, 5, 3, 4).flatten(1, 3)

    def _logits(self, f: Tensor, dim: int) -> Tensor:
        """Logits of both kernels `(B, G, H, W, slots)`, by the affinities to the regions."""
        query = self.query(f[:, :dim]) * (dim // self.heads) ** -0.5
        key = self.key(F.adaptive_avg_pool2d(f[:, dim:], 7))
        query, key = (x.flatten(2).unflatten(1, (self.heads, -1)) for x in (query, key))
        affinity = torch.einsum("bgcn,bgcl->bgnl", query, key)
        # regions are the channels of a 1x1 convolution
        logits = self.kernel_proj(affinity.permute(0, 3, 1, 2).contiguous())
        return logits.permute(0, 2, 3, 1).unflatten(2, f.shape[2:]).contiguous()


def _enlarged(height: int, width: int, least: int) -> tuple[int, int]:
    if height < width:
        return least, int(least / height * width)
    return int(least / width * height), least
