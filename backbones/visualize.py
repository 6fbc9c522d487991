"""Draw where a model attends: `python -m backbones.visualize routing IMAGE --model biformer_small`.

`routing` draws, for points of an image, the regions that BiFormer attends to at each stage:
BiFormer's routing made visible (arXiv 2303.08810, figure 1). `context` draws the context that
OverLoCK's overview gives its closer look, and the kernels that it mixes at points of the image
(arXiv 2502.20087). `concentration` draws how RAVLT's attention weighs the tokens of an image
(arXiv 2411.07635, section 3.3).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torchvision.transforms import functional as transforms

import backbones
from backbones._drawing import draw
from backbones.attention_maps import (
    Panel,
    concentration_panels,
    context_panels,
    routing_panels,
)
from backbones.pretrained import WeightsError


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


# what a program draws: a line of help, its family, and the model drawn by default
_PROGRAMS = {
    "routing": ("the regions that a region attends to", "BiFormer", "biformer_small"),
    "context": ("the overview, and the kernels that it mixes", "OverLoCK", "overlock_t"),
    "concentration": ("the weights of all tokens", "RAVLT", "ravlt_t"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m backbones.visualize", description="Draw where a model attends."
    )
    programs = parser.add_subparsers(dest="program", required=True)
    for name, (text, family, model) in _PROGRAMS.items():
        program = programs.add_parser(name, help=f"{text} ({family})")
        program.add_argument("image", type=Path, help="any image file")
        program.add_argument("--model", default=model, help=f"default: {model}")
        program.add_argument("-o", "--output", type=Path, required=True, help="PNG file to write")
        weights = program.add_mutually_exclusive_group()
        weights.add_argument("--checkpoint", metavar="FILE", help="weights, official ones too")
        weights.add_argument("--untrained", action="store_true", help="use no weights at all")
        program.add_argument("--size", type=int, default=224, help="shorter side; 0: as it is")
        if name != "concentration":
            _add_points(program)
    return parser


def _add_points(program: argparse.ArgumentParser) -> None:
    where = program.add_mutually_exclusive_group()
    where.add_argument(
        "--at", type=float, nargs=2, metavar=("X", "Y"), action="append",
        help="a point, from 0 to 1 across and down, as often as wanted; default: the middle",
    )  # fmt: skip
    where.add_argument("--click", action="store_true", help="show the image and wait for a click")


def _points(args: argparse.Namespace, image: Image.Image) -> list[tuple[int, int]]:
    if args.click:
        return [click(image)]
    points = []
    for x, y in args.at or [(0.5, 0.5)]:
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise ValueError(f"--at {x} {y} must be from 0 to 1, across and down")
        column, row = int(x * image.width), int(y * image.height)
        points.append((min(column, image.width - 1), min(row, image.height - 1)))
    return points


def _rows(args: argparse.Namespace, model: nn.Module, image: Image.Image) -> list[list[Panel]]:
    """A row of panels per point."""
    x = normalised(image, model)
    if args.program == "concentration":
        rows = [concentration_panels(model, x)]
    else:
        panels = routing_panels if args.program == "routing" else context_panels
        rows = [panels(model, x, point) for point in _points(args, image)]
    if not rows[0]:
        family = _PROGRAMS[args.program][1]
        raise ValueError(f"{args.program} draws {family} models, not {args.model}")
    return rows


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
        rows = _rows(args, model, image)
        weights = "untrained" if args.untrained else args.checkpoint or "official weights"
        draw(image, rows, f"{args.model} ({weights}), {args.image.name}", args.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
