"""Resizing tables of relative positions on a geometric grid, as BEiT and timm do.

Offsets of the old table are spread over those of the new one with distances that grow by a constant
ratio from the centre; between them the table is interpolated linearly. Near offsets, of which there
are most pairs, keep their values. (BEiT, arXiv 2106.08254; timm's `resize_rel_pos_bias_table`,
whose results these are to the bit, and which older versions of timm get wrong for these tables.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def resize_table(table: Tensor, rows: int, cols: int) -> Tensor:
    """Interpolate a table for windows of another size.

    Args:
        table: `(heads, 2P - 1, 2Q - 1)`.
        rows: Rows of the new table, odd.
        cols: Its columns, odd.

    Returns:
        The table `(heads, rows, cols)`, computed in float32 on the CPU; `table` itself if it fits.
    """
    if tuple(table.shape[1:]) == (rows, cols):
        return table
    if table.is_meta:
        return table.new_empty(len(table), rows, cols)
    values = table.detach().float().cpu()
    vertical, horizontal = _neighbours(values.shape[1], rows), _neighbours(values.shape[2], cols)
    resized = torch.zeros(len(values), rows, cols)
    for y, weight_y in vertical:
        for x, weight_x in horizontal:
            resized += values[:, y][:, :, x] * (weight_y[:, None] * weight_x)
    total_y, total_x = (below[1] + above[1] for below, above in (vertical, horizontal))
    return (resized / (total_y[:, None] * total_x)).to(table)


def _neighbours(source: int, target: int) -> list[tuple[Tensor, Tensor]]:
    """For every new offset the old one below and the one above: their indices, their weights."""
    positions = torch.tensor(_positions(source, target))
    wanted = torch.arange(-(target // 2), target // 2 + 1, dtype=torch.float32)
    above = torch.bucketize(wanted, positions).clamp(max=source - 1)
    below = (above - 1).clamp(min=0)
    # outside the grid the distance to the end is none of the weights
    to_below = (wanted - positions[below]).clamp(min=0)
    to_above = (positions[above] - wanted).clamp(min=0)
    hit = (to_below == 0) & (to_above == 0)
    return [(below, to_above.masked_fill(hit, 1)), (above, to_below.masked_fill(hit, 1))]


def _positions(source: int, target: int) -> list[float]:
    """Where `source` old offsets lie among `target` new ones."""
    reach, ratio, low, high = source // 2, 1.01, 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**reach) / (1 - ratio) > target // 2:
            high = ratio
        else:
            low = ratio
    # the ratio may fail to fill the new table exactly; what lies outside takes the end value
    distances, distance = [], 1.0
    for step in range(1, reach + 1):
        distances.append(distance)
        distance += ratio**step
    return [-d for d in reversed(distances)] + [0.0] + distances
