"""What is known about official weights and the papers that they belong to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .errors import WeightsError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper and the code that its authors published.

    Attributes:
        title: Its title.
        authors: Their names, given names first, in the order of the paper.
        venue: Short name of the conference, without the year; empty for what is on arXiv only.
        year: Of the conference, else of the first version.
        arxiv: Its number there, as `2204.01697`.
        code: Address of the repository.
        code_license: SPDX identifier, in lower case, of that repository; "none" if it states none.
    """

    title: str
    authors: tuple[str, ...]
    venue: str
    year: int
    arxiv: str
    code: str
    code_license: str

    @property
    def bibtex(self) -> str:
        """The entry of a bibliography."""
        surname = self.authors[0].rpartition(" ")[2]
        word = next(w for w in re.findall(r"\w+", self.title) if w not in ("A", "The"))
        fields = {
            "title": f"{{{self.title}}}",
            "author": " and ".join(self.authors),
            "booktitle": self.venue,
            "year": str(self.year),
            "eprint": self.arxiv,
            "archivePrefix": "arXiv",
        }
        lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
        kind = "inproceedings" if self.venue else "misc"
        return "\n".join([f"@{kind}{{{surname.lower()}{self.year}{word.lower()},", *lines, "}"])


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One official release of one `model.tag`: where it is, what it expects, what it reached.

    The hashes of the files are in `checksums.json`.

    Attributes:
        name: `model.tag`, as timm writes it.
        hub_id: `org/repo` on the hub, or None if they are not there; unless `direct`, `note` says
            what to do then.
        filename: The file in that repository; without one, what the authors call the file.
        urls: Where the authors released the same weights, under their own tensor names.
        dead_links: Address of the report that `urls` work no more, if so.
        direct: Whether the first of `urls` is a file that can be downloaded, for want of a hub.
        prefer_ema: Whether the moving average of the weights is meant, should the file hold both.
        wrapping: How that file holds the state dict, as far as it is known.
        converted_from: What somebody else than the authors made that file from: an address, or in
            words; empty for the authors' own file.
        num_classes: Width of the classifier; 0 if there is none.
        input_size: Channels, height and width of the images the accuracy was measured on.
        crop_pct: Side of the centre crop over side of the resized image.
        crop_mode: timm's name of how images were cropped: "center", or "squash" for whole images
            that were warped to the input size.
        interpolation: How images were resized.
        mean: Channel means the images were normalised with, on a scale of 0 to 1.
        std: Channel standard deviations likewise.
        license: SPDX identifier, in lower case, of the weights (not of our code).
        top1: Where an ImageNet-1k top-1 accuracy was reported -> percent: in the "paper", by
            "timm", in the readme of the official "repository", in a "log" that is quoted there.
        paper: The paper, and the code that wrote the weights.
        note: Anything a user should know beyond that: known problems, in sentences.
    """

    name: str
    hub_id: str | None
    filename: str = "model.safetensors"
    urls: tuple[str, ...] = ()
    dead_links: str = ""
    direct: bool = False
    prefer_ema: bool = False
    wrapping: str
    converted_from: str = ""
    num_classes: int = 1000
    input_size: tuple[int, int, int] = (3, 224, 224)
    crop_pct: float = 0.875
    crop_mode: Literal["center", "squash"] = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    license: str
    top1: Mapping[str, float]
    paper: Paper
    note: str = ""

    @property
    def model(self) -> str:
        """The model's name without the tag."""
        return self.name.partition(".")[0]

    @property
    def format(self) -> Literal["safetensors", "torch"]:
        """How the file is written; those of "torch" are pickles, of which only tensors are read."""
        return "safetensors" if self.filename.endswith(".safetensors") else "torch"

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
        return f"hf-hub:{self.hub_id}"
