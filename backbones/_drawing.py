"""Draw panels over an image: what `visualize.py` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as transforms

from .attention_maps import Panel

_ACCENT = "#ff8c1a"
# end of the colour scale, in times the average weight
_MOST = 3.0


def draw(image: Image.Image, rows: Sequence[Sequence[Panel]], title: str, path: Path) -> None:
    """Draw an image and panels beside it, row by row.

    Args:
        image: What the model saw.
        rows: What to lay over it; all rows of equal length.
        title: Above the picture.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wide, columns = 3.2 * max(0.6, min(1.8, image.width / image.height)), len(rows[0]) + 1
    figure = Figure(figsize=(wide * columns, 3.4 * len(rows) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, panels in zip(grid, rows, strict=True):
        _draw_image(axes[0], image, panels)
        for place, panel in zip(axes[1:], panels, strict=True):
            _draw_panel(place, image, panel)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], xlim=(0, image.width), ylim=(image.height, 0))
    figure.savefig(path, dpi=110)


def _draw_image(axes: Any, image: Image.Image, panels: Sequence[Panel]) -> None:
    axes.imshow(image)
    axes.set_title("image", fontsize=9)
    with_query = [panel for panel in panels if panel.query is not None]
    if with_query:
        _outline(axes, with_query[0])


def _draw_panel(axes: Any, image: Image.Image, panel: Panel) -> None:
    (rows, cols), (height, width) = panel.heat.shape[:2], panel.cell
    axes.set_title(panel.title, fontsize=9)
    if panel.query is not None:
        axes.imshow(_lit(image, panel).numpy())
        lines = {"color": "white", "linewidth": 0.4, "alpha": 0.5}
        axes.hlines([row * height for row in range(rows)], 0, image.width, **lines)
        axes.vlines([col * width for col in range(cols)], 0, image.height, **lines)
        _outline(axes, panel)
        return
    extent = (0, cols * width, rows * height, 0)
    if panel.heat.ndim == 3:
        axes.imshow(panel.heat.numpy(), interpolation="nearest", extent=extent)
        return
    axes.imshow(transforms.to_grayscale(image), cmap="gray")
    heat = axes.imshow(
        panel.heat.numpy(), cmap="inferno", vmin=0, vmax=_MOST, alpha=0.6, interpolation="nearest",
        extent=extent,
    )  # fmt: skip
    bar = axes.figure.colorbar(heat, ax=axes, orientation="horizontal", shrink=0.8, extend="max")
    bar.set_label("times the average weight", fontsize=8)


def _lit(image: Image.Image, panel: Panel) -> Tensor:
    """The image `(H, W, 3)`, dark and grey but where there is heat."""
    (height, width), color = panel.cell, transforms.to_tensor(image)
    heat = panel.heat.repeat_interleave(height, 0).repeat_interleave(width, 1)
    light = torch.zeros(image.height, image.width)
    light[: len(heat), : heat.shape[1]] = heat[: image.height, : image.width] / heat.max()
    grey = 0.35 * color.mean(0, keepdim=True)
    return (light * color + (1 - light) * grey).permute(1, 2, 0)


def _outline(axes: Any, panel: Panel) -> None:
    from matplotlib.patches import Rectangle

    assert panel.query is not None
    (row, col), (height, width) = panel.query, panel.cell
    corner = (col * width, row * height)
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=_ACCENT, linewidth=2))
