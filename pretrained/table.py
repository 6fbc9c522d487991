"""What is known about one set of official weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import WeightsError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One official release of one `model.tag`: where it is, what it expects, what it reached.

    Attributes:
        name: `model.tag`, as timm writes it.
        hub_id: `org/repo` on the hub, or None if they are not there; unless `direct`, `note` says
            what to do then.
        filename: The file in that repository.
        revision: Commit of that repository (40 hex digits), or None while it is not known; the
            hub's main branch is used then.
        sha256: Hash of that file, or None while it is not known.
        urls: Where the authors released the same weights, under their own tensor names.
        direct: Whether the first of `urls` is a file that can be downloaded, for want of a hub.
        prefer_ema: Whether the moving average of the weights is meant, should the file hold both.
        num_classes: Width of the classifier.
        input_size: Channels, height and width of the images the accuracy was measured on.
        crop_pct: Side of the centre crop over side of the resized image.
        interpolation: How images were resized.
        mean: Channel means the images were normalised with, on a scale of 0 to 1.
        std: Channel standard deviations likewise.
        license: SPDX identifier, in lower case, of the weights (not of our code).
        top1: Where an ImageNet-1k top-1 accuracy was reported -> percent.
        source: The paper and the official repository.
        note: Anything a user should know beyond that.
    """

    name: str
    hub_id: str | None
    filename: str = "model.safetensors"
    revision: str | None = None
    sha256: str | None = None
    urls: tuple[str, ...] = ()
    direct: bool = False
    prefer_ema: bool = False
    num_classes: int = 1000
    input_size: tuple[int, int, int] = (3, 224, 224)
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    license: str
    top1: Mapping[str, float]
    source: str
    note: str = ""

    @property
    def model(self) -> str:
        """The model's name without the tag."""
        return self.name.partition(".")[0]

    @property
    def location(self) -> str:
        """The weights as a location that `load_weights` understands.

        Raises:
            WeightsError: They cannot be downloaded.
        """
        if self.direct:
            return self.urls[0]
        if self.hub_id is None:
            raise WeightsError(f"{self.name} cannot be downloaded: {self.note}")
        return f"hf-hub:{self.hub_id}" + (f"@{self.revision}" if self.revision else "")
