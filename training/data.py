"""From a data set to batches: seeded samples, unreadable files replaced, loaders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .augment import INTERPOLATIONS, Transform, View
from .config import option, require
from .digits import Digits
from .errors import UsageError
from .keys import key, seed_host
from .runtime import World
from .sampler import Sample
from .sources import Source, open_source, read_image

Batch = tuple[Tensor, Tensor, Tensor]
_TRIES = 10


@dataclass(frozen=True)
class DataConfig:
    """Images and how the model sees them."""

    name: str = option(
        "digits", "digits, a folder with train/ and val/, or hfds/..., tfds/..., torch/..., wds/..."
    )
    root: str | None = option(None, "where a named data set lies or is cached", flag="data_root")
    batch_size: int = option(64, "images per step over all processes")
    img_size: int | None = option(None, "input side in pixels; none: the model's, 32 for digits")
    crop_pct: float | None = option(None, "evaluation: crop side / image side; none: the model's")
    crop_mode: str | None = option(
        None,
        "evaluation: crop the centre, squash or pad to a square; none: the model's",
        choices=("center", "squash", "border"),
    )
    interpolation: str | None = option(
        None, "evaluation: resizing; none: the model's", choices=INTERPOLATIONS
    )
    mean: tuple[float, ...] | None = option(None, "pixel mean per channel; none: the model's")
    std: tuple[float, ...] | None = option(None, "pixel deviation per channel; none: the model's")
    workers: int | None = option(
        None, "loading processes per process; none: 0 for the digits, else up to 8", may_change=True
    )
    max_bad: float = option(0.01, "largest share of unreadable images", may_change=True)

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"--batch-size must be at least 1, not {self.batch_size}")
        require(
            self.img_size is None or self.img_size >= 1,
            f"--img-size must be at least 1, not {self.img_size}",
        )
        require(self.workers is None or self.workers >= 0, f"--workers is negative: {self.workers}")
        require(
            self.crop_pct is None or 0 < self.crop_pct <= 1,
            f"--crop-pct must lie between 0 and 1, not {self.crop_pct}",
        )
        require(0 <= self.max_bad <= 1, f"--max-bad must lie between 0 and 1, not {self.max_bad}")
        for name in ("mean", "std"):
            value = getattr(self, name)
            require(
                value is None or (len(value) == 3 and (name == "mean" or min(value) > 0)),
                f"--{name} takes three numbers, of --std positive ones, not {value}",
            )


@dataclass(frozen=True)
class Splits:
    """The two halves of a data set, with the same classes."""

    train: Source
    val: Source

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The class names, none where the data set does not tell."""
        return self.train.classes


def open_splits(config: DataConfig) -> Splits:
    """Open the training and the held-out images.

    Raises:
        UsageError: Nothing there, or the two halves have different classes.
    """
    train = open_source(config.name, config.root, "train")
    val = open_source(config.name, config.root, "val")
    if train.classes != val.classes:
        ours, theirs = set(train.classes or ()), set(val.classes or ())
        raise UsageError(
            f"{config.name}: training and validation classes differ: only in training "
            f"{_some(ours - theirs)}, only in validation {_some(theirs - ours)}"
        )
    return Splits(train, val)


def resolve_view(config: DataConfig, model: nn.Module) -> View:
    """How `model` sees an image: the settings, then the data set's, then the model's own."""
    defaults = resolve_data_config(model=model)
    if config.name == "digits":
        defaults |= {"input_size": (3, 32, 32), "mean": (0.3,) * 3, "std": (0.35,) * 3}
        defaults |= {"interpolation": "bilinear", "crop_pct": 1.0}
    return View(
        size=config.img_size or defaults["input_size"][-1],
        mean=config.mean or defaults["mean"],
        std=config.std or defaults["std"],
        interpolation=config.interpolation or defaults["interpolation"],
        crop_pct=config.crop_pct or defaults["crop_pct"],
        crop_mode=config.crop_mode or defaults["crop_mode"],
    )


class KeyedDataset(Dataset[Any]):
    """Images whose random view is a pure function of the seed and of their place in the run.

    An unreadable image is replaced by another one that depends on the same key.

    Args:
        source: The images.
        transform: A random view, drawn from the global generators.
        seed: Seed of the run.
    """

    def __init__(self, source: Source, transform: Transform, seed: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __getitem__(self, sample: Sample) -> tuple[Tensor, int, int]:
        """The image `(3, H, W)`, its class, and the index of what could not be read, -1 if none."""
        failed = -1
        for attempt in range(_TRIES):
            index = sample.image if attempt == 0 else self._replacement(sample, attempt)
            try:
                image, label = read_image(self.source, index)
            except Exception:
                failed = sample.image
                continue
            seed_host(key(self.seed, "augment", *sample))
            return self.transform(image), label, failed
        # so many bad files exceed any limit: let the run stop with their names, not a worker
        return self.transform(Image.new("RGB", (64, 64))), 0, failed

    def _replacement(self, sample: Sample, attempt: int) -> int:
        return key(self.seed, "replace", *sample, attempt) % len(self.source)


def make_loader(
    source: Source,
    transform: Transform,
    batches: Iterable[list[Sample]],
    config: DataConfig,
    world: World,
    seed: int,
) -> DataLoader[Batch]:
    """Batches of `(images, labels, failed)`, see `KeyedDataset`; any number of workers, 0 too."""
    return DataLoader(
        KeyedDataset(source, transform, seed),
        batch_sampler=batches,
        num_workers=_worker_count(config, source, world),
        pin_memory=world.device.type == "cuda",
    )


def class_count(splits: Splits, asked: int | None) -> int:
    """The width of the classifier: what is asked for, or what the data has.

    Raises:
        UsageError: The two differ, or neither is known.
    """
    known = len(splits.classes) if splits.classes else asked
    if known is None:
        raise UsageError("this data set does not tell its classes: use --num-classes N")
    if asked not in (None, known):
        raise UsageError(f"--num-classes {asked}, but the data has {known} classes: leave it out")
    return known


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Make sure that a batch of labels `(B,)` fits the classifier, before it fails obscurely.

    Raises:
        UsageError: A label is not below `num_classes`.
    """
    largest = int(labels.max())
    if largest >= num_classes:
        raise UsageError(
            f"an image is of class {largest}, but the model has {num_classes} classes, from 0 on: "
            f"use --num-classes {largest + 1} or more"
        )


class BadFiles:
    """The images that could not be read.

    Args:
        source: The images.
        max_share: The largest share of them that may fail.
    """

    def __init__(self, source: Source, max_share: float) -> None:
        self.source = source
        self.limit = max_share * len(source)
        self.indices: set[int] = set()

    def add(self, failed: Tensor) -> None:
        """Remember the failures of a batch, `(B,)`, -1 where there was none."""
        self.indices.update(index for index in failed.tolist() if index >= 0)

    def share(self, world: World) -> None:
        """Let every process know the failures of all."""
        self.indices.update(*world.gather(self.indices))

    def lines(self) -> Iterator[str]:
        """The names and what is wrong with each."""
        for index in sorted(self.indices):
            yield f"{self.source.name(index)}\t{self._reason(index)}"

    def _reason(self, index: int) -> str:
        try:
            read_image(self.source, index)
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
        return "readable again"


def _worker_count(config: DataConfig, source: Source, world: World) -> int:
    if config.workers is not None:
        return config.workers
    return 0 if isinstance(source, Digits) else min(8, max(1, (os.cpu_count() or 1) // world.size))


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "") or "nothing"
