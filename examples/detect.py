"""Train a detector in minutes on a CPU, measure its average precision, and draw what it finds.

    pip install scikit-image scikit-learn torchmetrics pycocotools
    python examples/detect.py shapes --backbone davit_tiny
    python examples/detect.py trees

`shapes` learns circles, squares and triangles on photos, new ones in every step, and is measured on
photos that training does not see. `trees` learns tiles of real aerial photos by heart and is
measured on the same tiles: that shows that images, boxes and losses fit, not how good it is.

Everything is trained from scratch; `build_detector(..., pretrained_backbone=True)` starts from the
official weights of the backbone.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from detection_data import (
    HELD_OUT_PHOTOS,
    SHAPES,
    TRAIN_PHOTOS,
    AerialTiles,
    Sample,
    ShapesOnPhotos,
    Target,
    collate,
    fetch_aerial,
    load_photos,
)
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision.ops import nms
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

from backbones.detection import DETECTORS, build_detector
from backbones.training.runtime import versions

ROOT = Path(__file__).parents[1]
TRAIN_SEED, HELD_OUT_SEED = 0, 1
Pictures = ShapesOnPhotos | AerialTiles


def load(given: argparse.Namespace) -> tuple[Pictures, Pictures, tuple[str, ...]]:
    """Pictures to train and to measure on, and the names of what is to be found on them."""
    if given.task == "trees":
        tiles = AerialTiles(fetch_aerial(given.out), given.size, per_side=2)
        return tiles, tiles, ("tree",)
    photos, count = load_photos(TRAIN_PHOTOS), given.steps * given.batch_size
    others = load_photos(HELD_OUT_PHOTOS)
    train_pictures = ShapesOnPhotos(photos, count, TRAIN_SEED, given.size)
    return train_pictures, ShapesOnPhotos(others, given.held_out, HELD_OUT_SEED, given.size), SHAPES


def train(
    detector: nn.Module, pictures: Pictures, steps: int, batch_size: int, lr: float
) -> list[float]:
    """Train with AdamW, a warm-up and a cosine; print a line every ten steps.

    Args:
        detector: What to train.
        pictures: In random order, again and again where there are too few.
        steps: How many.
        batch_size: Pictures in each.
        lr: The highest learning rate.

    Returns:
        The loss of every step.
    """
    generator = torch.Generator().manual_seed(TRAIN_SEED)
    sampler = RandomSampler(pictures, num_samples=steps * batch_size, generator=generator)
    loader = DataLoader(pictures, batch_size, sampler=sampler, collate_fn=collate)
    optimizer = torch.optim.AdamW(detector.parameters(), lr, weight_decay=0.05)
    warm_up = min(50, steps // 5)

    def rate(step: int) -> float:
        return min((step + 1) / (warm_up + 1), (1 + math.cos(math.pi * step / steps)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    detector.train()
    losses: list[float] = []
    start = time.monotonic()
    for step, (images, targets) in enumerate(loader, 1):
        loss = torch.stack(list(detector(images, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == steps:
            recent, pace = losses[-10:], (time.monotonic() - start) / step
            line = f"step {step}/{steps}  loss {sum(recent) / len(recent):.3f}  {pace:.2f} s/step"
            print(f"{line}  {pace * (steps - step) / 60:.1f} min left", flush=True)
    return losses


@torch.no_grad()
def predict(detector: nn.Module, samples: Sequence[Sample], batch_size: int) -> list[Target]:
    """Boxes, labels and scores, and masks if the detector has them, for every picture."""
    detector.eval()
    found: list[Target] = []
    for start in range(0, len(samples), batch_size):
        images, _ = collate(samples[start : start + batch_size])
        found += detector(images)
    return found


def average_precision(
    found: Sequence[Target], samples: Sequence[Sample], classes: Sequence[str]
) -> dict[str, float]:
    """Average precision as COCO defines it, in percent.

    Args:
        found: What `predict` returns.
        samples: The pictures and their targets.
        classes: Names, without the background.

    Returns:
        Of boxes: `AP` over IoU 0.5 to 0.95, `AP50`, `AP75` and `AP` of every class. Of masks, if
        there are any: `mask AP` and `mask AP50`.
    """
    try:
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(class_metrics=len(classes) > 1)
    except ImportError as error:
        raise SystemExit(f"{error}: pip install torchmetrics pycocotools") from None
    metric.update(list(found), [target for _, target in samples])
    values = metric.compute()
    scores = {"AP": values["map"], "AP50": values["map_50"], "AP75": values["map_75"]}
    if len(classes) > 1:
        labels, precisions = values["classes"].tolist(), values["map_per_class"].tolist()
        for label, precision in zip(labels, precisions, strict=True):
            scores[f"AP {classes[label - 1]}"] = precision
    if "masks" in found[0]:
        metric = MeanAveragePrecision(iou_type="segm")
        metric.update(
            [{**one, "masks": one["masks"][:, 0] > 0.5} for one in found],
            [{**target, "masks": target["masks"].bool()} for _, target in samples],
        )
        values = metric.compute()
        scores |= {"mask AP": values["map"], "mask AP50": values["map_50"]}
    return {name: round(100 * float(value), 1) for name, value in scores.items()}


def draw(
    found: Sequence[Target], samples: Sequence[Sample], classes: Sequence[str], path: Path
) -> None:
    """Write pictures at twice their size, true boxes in white, the best of found ones in colours.

    Args:
        found: What `predict` returns; left out are scores of less than 0.3, and boxes that a
            better one covers by half, of whichever class.
        samples: The pictures and their targets.
        classes: Names, without the background.
        path: A PNG file.
    """
    colours = ("red", "yellow", "cyan")
    tiles = []
    for (image, target), one in zip(samples, found, strict=True):
        large = nn.functional.interpolate(image[None], scale_factor=2.0, mode="bilinear")[0]
        tile = (255 * large).to(torch.uint8)
        keep = nms(one["boxes"], one["scores"], 0.5)
        keep = keep[one["scores"][keep] >= 0.3]
        if len(target["boxes"]):
            tile = draw_bounding_boxes(tile, 2 * target["boxes"], colors="white")
        if len(keep):
            labels = [label - 1 for label in one["labels"][keep].tolist()]
            names = [classes[label] for label in labels] if len(classes) > 1 else None
            chosen: list[Any] = [colours[label] for label in labels]
            tile = draw_bounding_boxes(tile, 2 * one["boxes"][keep], names, chosen, width=2)
        tiles.append(tile)
    picture = to_pil_image(make_grid(tiles, nrow=3, padding=4, pad_value=255))
    # 256 colours are a third of the file
    picture.quantize().save(path, optimize=True)


def write(
    given: argparse.Namespace, scores: dict[str, float], more: dict[str, Any], path: Path
) -> None:
    """Add what was measured to a JSON file, under its task and model.

    Args:
        given: The command line.
        scores: What `average_precision` returns.
        more: What else is to be known.
        path: The file; there may be none yet.
    """
    report = {
        "command": " ".join(["python examples/detect.py", *sys.argv[1:]]),
        "measured_on": "the training tiles" if given.task == "trees" else "held-out photos",
        "scores": scores,
        **more,
        "versions": {
            "python": platform.python_version(),
            "torchvision": torchvision.__version__,
            **versions(),
        },
        "device": f"CPU, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }
    reports = json.loads(path.read_text()) if path.is_file() else {}
    reports[f"{given.task}, {given.detector}, {given.backbone}"] = report
    path.write_text(json.dumps(dict(sorted(reports.items())), indent=1) + "\n")
    print(path)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("task", choices=("shapes", "trees"))
    parser.add_argument("--detector", choices=tuple(DETECTORS), default="fcos", help="[fcos]")
    parser.add_argument("--backbone", default="shvit_s1", help="any model [shvit_s1]")
    parser.add_argument("--steps", type=int, default=400, help="training steps [400]")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures in a step [8]")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate [1e-3]")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures, px [128]")
    parser.add_argument("--held-out", type=int, default=200, help="pictures to measure on [200]")
    parser.add_argument("--out", type=Path, default=Path("runs/detect"), help="[runs/detect]")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results and docs")
    return parser.parse_args()


def main() -> None:
    """Train, measure, draw and report."""
    given = parse()
    given.out.mkdir(parents=True, exist_ok=True)
    pictures, held_out, classes = load(given)
    samples = [held_out[index] for index in range(len(held_out))]
    torch.manual_seed(TRAIN_SEED)
    detector = build_detector(
        given.detector,
        given.backbone,
        len(classes) + 1,
        # pictures keep their size
        min_size=given.size,
        max_size=given.size,
    )
    start = time.process_time()
    losses = train(detector, pictures, given.steps, given.batch_size, given.lr)
    more = {
        "training_cpu_seconds": round(time.process_time() - start),
        "losses": [round(loss, 3) for loss in (losses[0], sum(losses[-10:]) / len(losses[-10:]))],
        "pictures": len(samples),
        "boxes": sum(len(target["boxes"]) for _, target in samples),
    }
    found = predict(detector, samples, given.batch_size)
    scores = average_precision(found, samples, classes)
    print("  ".join(f"{name} {score:.1f}" for name, score in scores.items()))
    path = ROOT / "docs" if given.write else given.out
    path /= f"{given.task}-{given.detector}-{given.backbone}.png"
    some = slice(None, None, max(1, len(samples) // 6))
    draw(found[some][:6], samples[some][:6], classes, path)
    folder = ROOT / "benchmarks" / "results" if given.write else given.out
    write(given, scores, more, folder / "detection_example.json")


if __name__ == "__main__":
    main()
