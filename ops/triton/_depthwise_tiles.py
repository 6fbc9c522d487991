"""How the depthwise kernels share out maps: tiles, programs, units of strides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Any

from torch import Tensor

from ._launch import cdiv, next_power_of_2, rows_contiguous

# elements of the widest load, 16 bytes of a 16-bit type
_ALIGN = 8
# rows of a program that are at least worth the overlap
_LEAST_ROWS = 4


@dataclass(frozen=True)
class Strips:
    """The tiles of a program: strips, channels, columns of a strip.

    Attributes:
        groups: Strips side by side.
        block_c: Channels.
        span: Columns of a strip.
        num_warps: Of a program.
    """

    groups: int
    block_c: int
    span: int
    num_warps: int = 4

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments and options."""
        return {
            "GROUPS": self.groups,
            "BLOCK_C": self.block_c,
            "SPAN": self.span,
            "num_warps": self.num_warps,
            "num_stages": 1,
            "enable_fp_fusion": True,
        }


def channel_block(channels: int) -> int:
    """Channels of a tile: 64, or 32 where they cover a pixel with fewer to spare."""
    return min((64, 32), key=lambda block: cdiv(channels, block) * block)


def strips_tile(size: int, channels: int, pre_act: str = "") -> Strips:
    """Tiles of kernels of `size` rows: what leaves taps and sums in the registers.

    Wide strips load, and activate, less twice; 7 columns divide the maps of images of 224 pixels.
    """
    of_thread, span = (2, 4) if size <= 5 else (1, 7)
    if pre_act and size == 3:
        span = 7
    block = channel_block(channels)
    return Strips(4 * 32 * of_thread // block, block, span)


def weight_tile(size: int, channels: int, pre_act: str) -> Strips:
    """Tiles of the gradient of the kernels, which also keeps a sum for each tap."""
    tile = strips_tile(size, channels, pre_act)
    return replace(tile, span={5: 5, 7: 5, 9: 4}.get(size, tile.span))


def norm_tile(channels: int) -> Strips:
    """Tiles of 3x3 kernels that hold all `channels` of their pixels."""
    block = max(32, next_power_of_2(channels))
    warps = max(4, block // 128)
    return Strips(warps * 128 // block, block, 2, warps)


def pixels_tile(channels: int, wide: bool) -> tuple[int, int, int]:
    """Pixels, channels and warps of the norm's backward pass; `wide` for float32."""
    block = max(32, next_power_of_2(channels))
    warps = min(16, max(4, block // 256))
    return max(1, warps * (128 if wide else 256) // block), block, warps


def programs_of(size: int) -> int:
    """Programs per multiprocessor among which rows are split, for kernels of `size` rows.

    Many even out the last that run; but the rows that two of them read cost products too.
    """
    return 16 if size == 3 else 4


def resident_of(size: int) -> int:
    """Programs of the gradient of the kernels that run on a multiprocessor at once."""
    return {3: 4, 5: 3, 7: 3}.get(size, 2)


def rows_of(height: int, programs: int, enough: int) -> int:
    """Rows of a program.

    Args:
        height: Rows of the map.
        programs: How many there are if each has all rows.
        enough: How many fill the device.
    """
    chunks = min(cdiv(enough, max(1, programs)), cdiv(height, _LEAST_ROWS))
    return cdiv(height, chunks)


def parts_of(items: int, enough: int) -> int:
    """Programs that share `items` evenly, at most `enough`."""
    return max(1, cdiv(items, max(1, cdiv(items, enough))))


class Grid:
    """How a map of `batch` images is shared out to programs, `enough` of which fill the device."""

    def __init__(
        self, size: tuple[int, int], channels: int, batch: int, tile: Strips, enough: int
    ) -> None:
        height, width = size
        self.tile, self.strips = tile, cdiv(width, tile.span)
        self.problems, self.channel_blocks = batch * self.strips, cdiv(channels, tile.block_c)
        blocks = cdiv(self.problems, tile.groups)
        self.rows = rows_of(height, blocks * self.channel_blocks, enough)
        self.chunks = cdiv(height, self.rows)
        self.items = blocks * self.chunks

    @property
    def programs(self) -> tuple[int, int]:
        """The grid: chunks of rows of blocks of strips, and blocks of channels."""
        return self.items, self.channel_blocks

    @property
    def sizes(self) -> tuple[int, ...]:
        """Strips in all and of an image, rows of a program, chunks of rows."""
        return self.problems, self.strips, self.rows, self.chunks


class Maps:
    """Maps `(B, H, W, C)`, their strides, and the unit that these are counted in."""

    def __init__(self, channels: int, *maps: Tensor | None) -> None:
        self.maps = [None if x is None else rows_contiguous(x) for x in maps]
        strides = [(0, 0, 0) if x is None else x.stride()[:3] for x in self.maps]
        self.align = gcd(_ALIGN, channels, *(n for each in strides for n in each))
        self.strides = [stride // self.align for each in strides for stride in each]
        self.channels = channels // self.align
