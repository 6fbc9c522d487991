"""Draw where a model attends: `python -m backbones.visualize routing IMAGE --model biformer_small`.

`routing` draws, for one point of an image, the regions that BiFormer attends to at each stage:
BiFormer's routing made visible (arXiv 2303.08810, figure 1). `concentration` draws how RAVLT's
attention weighs the tokens of an image (arXiv 2411.07635, section 3.3).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torchvision.transforms import functional as transforms

import backbones
from backbones.attention_maps import Panel, concentration_panels, routing_panels
from backbones.pretrained import WeightsError

_ACCENT = "#ff8c1a"
# end of the colour scale, in times the average weight
_MOST = 3.0


def draw(image: Image.Image, panels: Sequence[Panel], title: str, path: Path) -> None:
    """Draw an image and a panel per stage beside it.

    Args:
        image: What the model saw.
        panels: What to lay over it.
        title: Above the picture.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wide = 3.2 * max(0.6, min(1.8, image.width / image.height))
    figure = Figure(figsize=(wide * (len(panels) + 1), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    first, *rest = figure.subplots(1, len(panels) + 1)
    first.imshow(image)
    first.set_title("image", fontsize=9)
    for axes, panel in zip(rest, panels, strict=True):
        _draw_panel(axes, image, panel)
    if panels[0].query is not None:
        _outline(first, panels[0])
    for axes in (first, *rest):
        axes.set(xticks=[], yticks=[], xlim=(0, image.width), ylim=(image.height, 0))
    figure.savefig(path, dpi=110)


def _draw_panel(axes: Any, image: Image.Image, panel: Panel) -> None:
    (rows, cols), (height, width) = panel.heat.shape, panel.cell
    axes.set_title(panel.title, fontsize=9)
    if panel.query is not None:
        axes.imshow(_lit(image, panel).numpy())
        lines = {"color": "white", "linewidth": 0.4, "alpha": 0.5}
        axes.hlines([row * height for row in range(rows)], 0, image.width, **lines)
        axes.vlines([col * width for col in range(cols)], 0, image.height, **lines)
        _outline(axes, panel)
        return
    axes.imshow(transforms.to_grayscale(image), cmap="gray")
    heat = axes.imshow(
        panel.heat.numpy(), cmap="inferno", vmin=0, vmax=_MOST, alpha=0.6, interpolation="nearest",
        extent=(0, cols * width, rows * height, 0),
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


def click(image: Image.Image) -> tuple[int, int]:
    """Show an image in a window and wait for a click.

    Args:
        image: What to show.

    Returns:
        Column and row of the pixel.

    Raises:
        ValueError: There is no screen, or the window was closed.
    """
    import matplotlib.pyplot as plt

    if plt.get_backend().lower() == "agg":
        raise ValueError("--click needs a screen: give the point with --at X Y")
    plt.imshow(image)
    plt.title("click the region that attends")
    points = plt.ginput(1, timeout=0)
    plt.close()
    if not points:
        raise ValueError("nothing was clicked: click the image, or give the point with --at X Y")
    return int(points[0][0]), int(points[0][1])


def load_image(path: Path, size: int | None) -> Image.Image:
    """Read an image.

    Args:
        path: The file.
        size: Pixels of its shorter side after resizing, None to keep its size.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"cannot read {path} as an image: {error}") from None
    return image if size is None else transforms.resize(image, size, antialias=True)


def load_model(name: str, checkpoint: str | None, untrained: bool) -> nn.Module:
    """Create a model with its official weights, those of a file, or none.

    Args:
        name: Of the model.
        checkpoint: A file of weights, official or ours.
        untrained: Leave the weights as they start.

    Raises:
        ValueError: An unknown model; weights that cannot be had.
    """
    overlay = None if checkpoint is None else {"file": checkpoint}
    create = partial(backbones.create_model, name, pretrained_cfg_overlay=overlay)
    try:
        return create(pretrained=not untrained).eval()
    except WeightsError as error:
        raise ValueError(f"{error}; here with --checkpoint FILE, or --untrained") from error


def normalised(image: Image.Image, model: nn.Module) -> Tensor:
    """The batch `(1, 3, H, W)` that a model takes."""
    cfg: Any = model.pretrained_cfg
    tensor = transforms.to_tensor(image)
    mean, std = cfg.get("mean") or (0.5,) * 3, cfg.get("std") or (0.5,) * 3
    return transforms.normalize(tensor, mean, std)[None]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m backbones.visualize", description="Draw where a model attends."
    )
    programs = parser.add_subparsers(dest="program", required=True)
    routing = programs.add_parser("routing", help="the regions that a region attends to (BiFormer)")
    tokens = programs.add_parser("concentration", help="the weights of all tokens (RAVLT)")
    for program, model in ((routing, "biformer_small"), (tokens, "ravlt_t")):
        program.add_argument("image", type=Path, help="any image file")
        program.add_argument("--model", default=model, help=f"default: {model}")
        program.add_argument("-o", "--output", type=Path, required=True, help="PNG file to write")
        weights = program.add_mutually_exclusive_group()
        weights.add_argument("--checkpoint", metavar="FILE", help="weights, official ones too")
        weights.add_argument("--untrained", action="store_true", help="use no weights at all")
        program.add_argument("--size", type=int, default=224, help="shorter side; 0: as it is")
    where = routing.add_mutually_exclusive_group()
    where.add_argument(
        "--at", type=float, nargs=2, metavar=("X", "Y"), default=(0.5, 0.5),
        help="the point, from 0 to 1 across and down; default: the middle",
    )  # fmt: skip
    where.add_argument("--click", action="store_true", help="show the image and wait for a click")
    return parser


def _point(args: argparse.Namespace, image: Image.Image) -> tuple[int, int]:
    if args.click:
        return click(image)
    if not all(0 <= share <= 1 for share in args.at):
        raise ValueError(f"--at {args.at[0]} {args.at[1]} must be from 0 to 1, across and down")
    column, row = args.at[0] * image.width, args.at[1] * image.height
    return min(int(column), image.width - 1), min(int(row), image.height - 1)


def _panels(args: argparse.Namespace, model: nn.Module, image: Image.Image) -> list[Panel]:
    x = normalised(image, model)
    if args.program == "routing":
        panels = routing_panels(model, x, _point(args, image))
    else:
        panels = concentration_panels(model, x)
    if not panels:
        family = "BiFormer" if args.program == "routing" else "RAVLT"
        raise ValueError(f"{args.program} draws {family} models, not {args.model}")
    return panels


def main(argv: Sequence[str]) -> int:
    """Run the program.

    Args:
        argv: The command line without the program.

    Returns:
        0, or 2 after one line on stderr that says what is wrong.
    """
    args = _parser().parse_args(argv)
    try:
        image = load_image(args.image, args.size or None)
        model = load_model(args.model, args.checkpoint, args.untrained)
        panels = _panels(args, model, image)
        weights = "untrained" if args.untrained else args.checkpoint or "official weights"
        draw(image, panels, f"{args.model} ({weights}), {args.image.name}", args.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
