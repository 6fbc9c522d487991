"""Regions of a map as tensors: what the routing kernels do by index arithmetic, by copies."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Regions(NamedTuple):
    """How a map is divided, in the order of the registered ops: `rows * cols` regions.

    Region `row * cols + col` holds `height * width` tokens; those beyond the map count too.
    """

    rows: int
    cols: int
    height: int
    width: int

    @property
    def regions(self) -> int:
        """Regions R."""
        return self.rows * self.cols

    @property
    def tokens(self) -> int:
        """Tokens t of a region."""
        return self.height * self.width

    def filled(self, height: int, width: int) -> bool:
        """Whether a map fills all regions."""
        return (self.rows * self.height, self.cols * self.width) == (height, width)


def partition(x: Tensor, at: Regions) -> Tensor:
    """Cut a map `(B, H, W, C)`, filled up with zeros, into regions `(B, R, t, C)`."""
    batch, height, width, channels = x.shape
    if not at.filled(height, width):
        x = F.pad(x, (0, 0, 0, at.cols * at.width - width, 0, at.rows * at.height - height))
    x = x.reshape(batch, at.rows, at.height, at.cols, at.width, channels).transpose(2, 3)
    return x.reshape(batch, at.regions, at.tokens, channels)


def merge(x: Tensor, at: Regions, height: int, width: int) -> Tensor:
    """Put regions `(B, R, t, C)` together again: a map `(B, H, W, C)`, contiguous."""
    batch, _, _, channels = x.shape
    x = x.reshape(batch, at.rows, at.cols, at.height, at.width, channels).transpose(2, 3)
    x = x.reshape(batch, at.rows * at.height, at.cols * at.width, channels)
    return x[:, :height, :width].contiguous()


def inside(x: Tensor, at: Regions) -> Tensor | None:
    """Which tokens `(R, t)` of the regions lie in the map `(B, H, W, C)`; None if all do."""
    height, width = x.shape[1:3]
    if at.filled(height, width):
        return None
    ones = torch.ones(1, height, width, 1, dtype=torch.bool, device=x.device)
    return partition(ones, at)[0, ..., 0]


def pad_tokens(tokens: Tensor, real: Tensor | None, pad: Tensor | None) -> Tensor:
    """Put `pad` where tokens `(B, R, t, C)` are not real; without it they stay zero."""
    if real is None or pad is None:
        return tokens
    return torch.where(real[..., None], tokens, pad.to(tokens.dtype))


def flat_index(regions: Tensor) -> Tensor:
    """Numbers `(B, R, K)` within an image as numbers `(B * R, K)` within the batch."""
    batch, count, _ = regions.shape
    first = torch.arange(batch, device=regions.device) * count
    return (regions + first[:, None, None]).flatten(0, 1)


def validate(
    qkv: Tensor,
    num_heads: int,
    num_regions: tuple[int, int],
    region_size: tuple[int, int],
    pad: Tensor | None,
) -> None:
    """Refuse shapes that do not fit together.

    Raises:
        ValueError: With the shape and what it must be.
    """
    if num_heads < 1 or min(num_regions) < 1 or min(region_size) < 1:
        raise ValueError(
            f"num_heads={num_heads}, num_regions={num_regions} and region_size={region_size} "
            "must be positive"
        )
    if qkv.ndim != 4 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"qkv {tuple(qkv.shape)} must be a map (B, H, W, 3C) with channels a multiple of "
            f"3 * num_heads = {3 * num_heads}"
        )
    reach = (num_regions[0] * region_size[0], num_regions[1] * region_size[1])
    if reach[0] < qkv.shape[1] or reach[1] < qkv.shape[2]:
        raise ValueError(
            f"num_regions={num_regions} of region_size={region_size} cover {reach}: take more or "
            f"larger ones for a map {tuple(qkv.shape[1:3])}"
        )
    if pad is not None and tuple(pad.shape) != (qkv.shape[-1],):
        raise ValueError(f"pad {tuple(pad.shape)} must be a vector of {qkv.shape[-1]} like qkv")
