"""Windows around the pixels of a map that never leave it: what neighborhood ops share.

Along an axis of length L the window of position i has `size` positions, `dilation` apart. Those of
one residue `i % dilation` are neighbors and no others: with p = i // dilation, of n positions, the
window starts at `clamp(p - size // 2, 0, n - size)`. So near a border windows are shifted inside,
and a slot is counted from the start of the window, not from its middle. The rule is that of
Neighborhood Attention (arXiv 2204.07143 and 2209.15001).
"""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[int, int]


def pair(value: int | Pair) -> Pair:
    """One number for both axes, or one for each."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def window_starts(
    length: int, size: int, dilation: int = 1, device: torch.device | None = None
) -> Tensor:
    """First position of the window of every position of an axis, `(length,)`."""
    position = torch.arange(length, device=device)
    residue = position % dilation
    count = (length - residue + dilation - 1) // dilation
    start = (position // dilation - size // 2).clamp(min=0)
    return torch.minimum(start, count - size) * dilation + residue


def window_positions(
    length: int, size: int, dilation: int = 1, device: torch.device | None = None
) -> Tensor:
    """Positions of the slots of every window of an axis, `(length, size)`."""
    slots = torch.arange(size, device=device) * dilation
    return window_starts(length, size, dilation, device)[:, None] + slots


def own_slots(
    length: int, size: int, dilation: int = 1, device: torch.device | None = None
) -> Tensor:
    """The slot of every position in its own window, `(length,)`: `size // 2` far from borders.

    The slot s of a position is `s - own` away from it; positions of equal own slots see the same
    offsets.
    """
    position = torch.arange(length, device=device)
    return (position - window_starts(length, size, dilation, device)) // dilation


def window_pixels(
    height: int, width: int, size: Pair, dilation: Pair = (1, 1), device: torch.device | None = None
) -> Tensor:
    """Pixels of the slots of every window of a map, row by row: `(height, width, rows * cols)`."""
    rows = window_positions(height, size[0], dilation[0], device)
    cols = window_positions(width, size[1], dilation[1], device)
    return (rows[:, None, :, None] * width + cols[None, :, None, :]).flatten(2)


def check_kernel(name: str, size: Pair, dilation: Pair = (1, 1), least: int = 3) -> None:
    """Refuse windows that have no middle.

    Args:
        name: What the caller names the size.
        size: Rows and columns of a window.
        dilation: Distance of its rows and columns.
        least: The smallest size that makes sense.

    Raises:
        ValueError: See above.
    """
    if any(k < least or k % 2 == 0 for k in size):
        raise ValueError(f"{name} {size} must be odd, and {least} or more")
    if min(dilation) < 1:
        raise ValueError(f"dilation {dilation} must be positive")


def check_fit(name: str, height: int, width: int, size: Pair, dilation: Pair = (1, 1)) -> None:
    """Refuse windows that do not fit the map.

    Args:
        name: What the caller names the size.
        height: Rows of the map.
        width: Columns of the map.
        size: Rows and columns of a window.
        dilation: Distance of its rows and columns.

    Raises:
        ValueError: See above.
    """
    need = size[0] * dilation[0], size[1] * dilation[1]
    if height < need[0] or width < need[1]:
        raise ValueError(
            f"{name} {size} with dilation {dilation} needs a map of at least {need[0]} x "
            f"{need[1]}, this one is {height} x {width}: resize it or take smaller windows"
        )


def check_windows(name: str, height: int, width: int, size: Pair, dilation: Pair = (1, 1)) -> None:
    """Refuse windows that have no middle, or do not fit the map; arguments as of `check_fit`."""
    check_kernel(name, size, dilation)
    check_fit(name, height, width, size, dilation)
