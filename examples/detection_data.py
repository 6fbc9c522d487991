"""What `detect.py` trains on: shapes on photos, without end, and the aerial photos of deepforest.

The photos come with scikit-image and scikit-learn; boxes and masks of the shapes are exact. The
four aerial photos, in which people marked 951 trees, lie in the wheel of deepforest.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import masks_to_boxes

SHAPES = ("circle", "square", "triangle")
TRAIN_PHOTOS = ("astronaut", "rocket", "hubble_deep_field", "immunohistochemistry")
TRAIN_PHOTOS += ("china.jpg", "flower.jpg")
# in the public domain, as its picture is shown in docs/
HELD_OUT_PHOTOS = ("chelsea", "coffee", "retina")

WHEEL = "deepforest-2.1.0-py3-none-any.whl"
WHEEL_SHA256 = "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
AERIAL = (
    "OSBS_029",
    "SOAP_061",
    "2019_YELL_2_541000_4977000_image_crop",
    "2019_YELL_2_528000_4978000_image_crop2",
)

Target = dict[str, Tensor]
Sample = tuple[Tensor, Target]


class ShapesOnPhotos(Dataset[Sample]):
    """Photos with one to three shapes that do not touch: image `(3, S, S)` in 0..1 and its target.

    A target has `boxes` `(N, 4)` in pixels, `labels` `(N,)` from 1 and `masks` `(N, S, S)`, 0 or 1.
    The same seed and index give the same picture.

    Args:
        photos: What the shapes lie on.
        count: How many pictures there are.
        seed: Of all pictures.
        size: Side of a picture, pixels; a photo is at least as large.
    """

    def __init__(self, photos: Sequence[np.ndarray], count: int, seed: int, size: int) -> None:
        self.photos, self.count, self.seed, self.size = photos, count, seed, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(f"picture {index} of {self.count}")
        rng = np.random.default_rng((self.seed, index))
        image = _crop(self.photos[rng.integers(len(self.photos))], self.size, rng)
        labels, masks = [], []
        for mask, label in _shapes(self.size, rng):
            noise = rng.normal(0, 8, (self.size, self.size, 3))
            colour = rng.integers(0, 256, 3) + noise
            image = np.where(mask[..., None], colour.clip(0, 255), image)
            labels.append(label)
            masks.append(mask)
        return _to_tensor(image), _target(np.stack(masks), labels)


class AerialTiles(Dataset[Sample]):
    """The middle of the four aerial photos in tiles; targets have `boxes` and `labels`, all 1.

    Args:
        folder: The data folder of deepforest.
        size: Side of a tile, pixels.
        per_side: Tiles from left to right and from top to bottom of every photo.
    """

    def __init__(self, folder: Path, size: int, per_side: int) -> None:
        self.samples: list[Sample] = []
        for name in AERIAL:
            with Image.open(folder / f"{name}.png") as file:
                image = np.asarray(file.convert("RGB"))
            boxes = read_boxes(folder / f"{name}.xml")
            top, left = ((side - per_side * size) // 2 for side in image.shape[:2])
            for row in range(per_side):
                for column in range(per_side):
                    corner = (left + column * size, top + row * size)
                    self.samples.append(_tile(image, boxes, corner, size))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def load_photos(names: Sequence[str]) -> list[np.ndarray]:
    """Photos `(H, W, 3)`, uint8, of scikit-image, and of scikit-learn where the name has a suffix.

    Args:
        names: Of `TRAIN_PHOTOS` and `HELD_OUT_PHOTOS`.
    """
    try:
        import skimage.data
        import sklearn.datasets
    except ImportError as error:
        raise SystemExit(f"{error}: pip install scikit-image scikit-learn") from None
    return [
        sklearn.datasets.load_sample_image(name)
        if name.endswith(".jpg")
        else getattr(skimage.data, name)()
        for name in names
    ]


def fetch_aerial(folder: Path) -> Path:
    """Download the wheel of deepforest, which is not installed, and unpack its data.

    Args:
        folder: Where to; a wheel that is there already is used.

    Returns:
        The folder with photos and boxes.
    """
    wheel = folder / WHEEL
    if not wheel.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--dest", str(folder), "deepforest==2.1.0"]
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"no {WHEEL} ({error}): put it into {folder}") from None
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise SystemExit(f"{wheel} has sha256 {found}, not {WHEEL_SHA256}: delete it")
    with zipfile.ZipFile(wheel) as archive:
        for name in AERIAL:
            for suffix in ("png", "xml"):
                archive.extract(f"deepforest/data/{name}.{suffix}", folder)
    return folder / "deepforest" / "data"


def read_boxes(path: Path) -> np.ndarray:
    """Boxes `(N, 4)` of a file in the format of Pascal VOC: left, top, right, bottom in pixels."""
    edges = ("xmin", "ymin", "xmax", "ymax")
    rows = [[float(box.findtext(e, "nan")) for e in edges] for box in _find_boxes(path)]
    return np.array(rows).reshape(-1, 4)


def collate(samples: Sequence[Sample]) -> tuple[list[Tensor], list[Target]]:
    """Lists of images and targets, as torchvision's detectors take them."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def _find_boxes(path: Path) -> Iterator[Any]:
    return ElementTree.parse(path).getroot().iter("bndbox")


def _crop(photo: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random square window of a photo, shrunk to `size`; half of them are mirrored."""
    height, width = photo.shape[:2]
    side = int(rng.integers(size, min(height, width) + 1))
    top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    window = Image.fromarray(photo[top : top + side, left : left + side])
    if rng.random() < 0.5:
        window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(window.resize((size, size), Image.Resampling.BILINEAR))


def _shapes(size: int, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, int]]:
    """Masks `(S, S)` of one to three shapes apart from each other, and their labels.

    They are from 24 pixels to 0.4 of the picture wide; squares and triangles are turned.
    """
    y, x = np.mgrid[:size, :size] + 0.5
    taken: list[tuple[float, float, float]] = []
    for _ in range(rng.integers(1, 4)):
        radius = rng.uniform(17, size / 5)
        cx, cy = rng.uniform(radius + 1, size - radius - 1, 2)
        if any(np.hypot(cx - a, cy - b) < radius + r + 2 for a, b, r in taken):
            continue
        taken.append((cx, cy, radius))
        kind = int(rng.integers(len(SHAPES)))
        yield _mask(SHAPES[kind], x - cx, y - cy, radius, rng.uniform(0, 2 * np.pi)), kind + 1


def _mask(shape: str, x: np.ndarray, y: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """Where a shape is whose corners, or edge, are `radius` away from its centre."""
    if shape == "circle":
        return np.hypot(x, y) <= radius
    corners = 4 if shape == "square" else 3
    # a regular polygon: on the inner side of every edge
    turns = angle + 2 * np.pi * np.arange(corners) / corners
    distances = [x * np.cos(turn) + y * np.sin(turn) for turn in turns]
    return np.max(distances, axis=0) <= radius * np.cos(np.pi / corners)


def _tile(image: np.ndarray, boxes: np.ndarray, corner: tuple[int, int], size: int) -> Sample:
    """A tile and the boxes of which at least half lies in it, cut at its edges."""
    left, top = corner
    moved = boxes - np.array([left, top, left, top])
    cut = moved.clip(0, size)
    keep = _areas(cut) >= 0.5 * _areas(moved)
    labels = torch.ones(int(keep.sum()), dtype=torch.int64)
    target = {"boxes": torch.tensor(cut[keep], dtype=torch.float32), "labels": labels}
    return _to_tensor(image[top : top + size, left : left + size]), target


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)


def _target(masks: np.ndarray, labels: list[int]) -> Target:
    found = torch.from_numpy(masks)
    # the last pixel is inside
    boxes = masks_to_boxes(found) + torch.tensor([0, 0, 1, 1])
    return {"boxes": boxes, "labels": torch.tensor(labels), "masks": found.to(torch.uint8)}


def _to_tensor(image: np.ndarray) -> Tensor:
    values = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
    return values.permute(2, 0, 1) / 255
