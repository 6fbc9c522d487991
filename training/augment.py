"""What happens to a training image: random views, and mixing within a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import NAME_TO_OP, AugmentOp
from torch import Tensor
from torchvision import transforms as T

from .config import option, require
from .errors import UsageError

Transform = Callable[[Image.Image], Tensor]
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class AugmentConfig:
    """Random views and mixing."""

    geometry: str = option(
        "auto",
        "random resized crop, or a small affine jitter; auto: affine for the digits",
        choices=("auto", "crop", "affine"),
    )
    scale: tuple[float, ...] = option((0.08, 1.0), "area of the random crop")
    ratio: tuple[float, ...] = option((3 / 4, 4 / 3), "aspect ratio of the random crop")
    hflip: float = option(0.5, "probability of a horizontal flip of a crop")
    color_jitter: float = option(0.0, "brightness, contrast, saturation; ignored by auto_augment")
    auto_augment: str | None = option(None, "timm policy, e.g. rand-m9-mstd0.5-inc1")
    train_interpolation: str | None = option(
        None, "resizing; none: as evaluated", choices=("random", *INTERPOLATIONS)
    )
    reprob: float = option(0.0, "probability of random erasing, with noise")
    mixup: float = option(0.0, "alpha of mixup, 0 for none")
    cutmix: float = option(0.0, "alpha of cutmix, 0 for none")
    mixup_prob: float = option(1.0, "probability of mixing a batch")
    mixup_switch_prob: float = option(0.5, "probability of cutmix where both are on")
    smoothing: float = option(0.05, "label smoothing")
    repeats: int = option(1, "views of an image per epoch that follow each other")

    def __post_init__(self) -> None:
        for name in ("hflip", "reprob", "mixup_prob", "mixup_switch_prob", "smoothing"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"augment.{name} must lie between 0 and 1, not {value}")
        require(self.repeats >= 1, f"--repeats must be at least 1, not {self.repeats}")
        for name in ("mixup", "cutmix", "color_jitter"):
            value = getattr(self, name)
            require(value >= 0, f"augment.{name} must not be negative: {value}")
        for name, most in (("scale", 1.0), ("ratio", float("inf"))):
            value = getattr(self, name)
            require(
                len(value) == 2 and 0 < value[0] <= value[1] <= most,
                f"--{name} takes two positive numbers, the smaller one first, not {value}",
            )

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed, which needs an even number of images."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class View:
    """How a model sees an image.

    Args:
        size: Side of the square input, pixels.
        mean: Per channel, of values in 0..1.
        std: Per channel, of values in 0..1.
        interpolation: Bilinear, bicubic, ...
        crop_pct: Side of the centre crop over side of the resized image.
        crop_mode: How an oblong image becomes a square: timm's center, squash or border.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"


def eval_transform(view: View) -> Transform:
    """Resize, centre crop, normalise: an RGB image to `(3, size, size)`."""
    return create_transform(
        (3, view.size, view.size),
        interpolation=view.interpolation,
        mean=view.mean,
        std=view.std,
        crop_pct=view.crop_pct,
        crop_mode=view.crop_mode,
    )


def train_transform(config: AugmentConfig, view: View, *, affine: bool) -> Transform:
    """A random view of an RGB image, `(3, size, size)`, drawn from the global generators.

    Args:
        config: Which randomness.
        view: How the model sees an image.
        affine: What `auto` geometry means.
    """
    if config.geometry == "affine" or (config.geometry == "auto" and affine):
        return _affine_transform(view)
    try:
        transform = create_transform(
            (3, view.size, view.size),
            is_training=True,
            scale=config.scale,
            ratio=config.ratio,
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            interpolation=config.train_interpolation or view.interpolation,
            mean=view.mean,
            std=view.std,
            re_prob=config.reprob,
            re_mode="pixel",
        )
    except (AssertionError, ValueError, IndexError) as error:
        raise UsageError(
            f"--auto-augment {config.auto_augment} is no policy of timm ({error}): use one like "
            "rand-m9-mstd0.5-inc1"
        ) from error
    return guard_posterize(transform)


def guard_posterize(transform: T.Compose) -> T.Compose:
    """Let posterize accept 0 bits, as Pillow did before version 13: the image turns black.

    timm's increasing posterize rounds to 0 bits now and then, which newer Pillows refuse.
    """
    for op in _augment_ops(transform):
        if op.aug_fn is _timm_posterize:
            op.aug_fn = _posterize
    return transform


class BatchMixer:
    """Mixup and cutmix of a batch, and soft targets.

    Args:
        config: Strengths and probabilities.
        num_classes: Width of the targets.
    """

    def __init__(self, config: AugmentConfig, num_classes: int) -> None:
        self._mixup = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            prob=config.mixup_prob,
            switch_prob=config.mixup_switch_prob,
            label_smoothing=config.smoothing,
            num_classes=num_classes,
        )

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Mix in place.

        Args:
            images: `(B, 3, H, W)`, B even.
            labels: `(B,)`, class numbers.
            seed: Key of this batch.

        Returns:
            The images and the targets, `(B, num_classes)`.
        """
        np.random.seed(seed & 0xFFFFFFFF)
        return self._mixup(images, labels)


_timm_posterize = NAME_TO_OP["Posterize"]


def _posterize(image: Image.Image, bits_to_keep: int, **settings: Any) -> Image.Image:
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return _timm_posterize(image, bits_to_keep, **settings)


def _augment_ops(transform: T.Compose) -> Iterator[AugmentOp]:
    for step in transform.transforms:
        yield from getattr(step, "ops", ())
        for policy in getattr(step, "policy", ()):
            yield from policy


def _affine_transform(view: View) -> Transform:
    return T.Compose(
        [
            T.Resize((view.size, view.size), T.InterpolationMode(view.interpolation)),
            T.RandomAffine(
                degrees=8.6,
                translate=(0.1, 0.1),
                scale=(0.9, 1.1),
                interpolation=T.InterpolationMode.BILINEAR,
            ),
            T.ToTensor(),
            T.Normalize(view.mean, view.std),
        ]
    )
