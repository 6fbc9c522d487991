"""Where images come from: the built-in digits, folders, and timm's data sets."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from timm.data import create_dataset

from .digits import Digits
from .errors import UsageError

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "test"),
}
_STREAMS = ("wds", "tfds", "hfids")
_FORMS = "a folder with train/ and val/, a name such as hfds/user/name or torch/cifar10, or digits"


class Source(Protocol):
    """A data set with random access."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The class names in order of their numbers, none where the data set does not tell."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The RGB image `index` and its class; any exception means that the file is unreadable."""

    def name(self, index: int) -> str:
        """The file, or another name, of image `index`."""


def open_source(data: str, root: str | None, split: str) -> Source:
    """Open one half of a data set.

    Args:
        data: `digits`, a folder in ImageNet layout, or a data set name of timm's.
        root: where a named data set lies or is cached.
        split: `train` or `val`.

    Raises:
        UsageError: nothing there, no such split, no images, an empty class folder.
    """
    if data == "digits":
        return Digits(train=split == "train")
    kind, slash, _ = data.partition("/")
    if slash and kind in _STREAMS and not Path(data).exists():
        raise UsageError(
            f"{data}: streams ({', '.join(_STREAMS)}) cannot be resumed exactly yet; use {_FORMS}"
        )
    if slash and kind in ("hfds", "torch") and not Path(data).exists():
        return _open_named(data, root, split)
    return _open_folder(Path(data), split)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode `image` to 8-bit RGB: 16-bit grey is scaled, palettes and alpha are resolved."""
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype("u1"))
    if image.mode in ("P", "PA", "LA"):
        image = image.convert("RGBA")
    return image.convert("RGB")


@dataclass(frozen=True)
class _Files:
    """A data set behind one of timm's readers."""

    reader: Any
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.reader)

    def load(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.reader[index]
        with file, Image.open(file) as image:
            return to_rgb(image), int(label)

    def name(self, index: int) -> str:
        return self.reader.filename(index, absolute=True)


@dataclass(frozen=True)
class _Torchvision:
    """One of torchvision's data sets."""

    dataset: Any
    title: str

    @property
    def classes(self) -> tuple[str, ...] | None:
        names = getattr(self.dataset, "classes", None)
        return None if names is None else tuple(map(str, names))

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.dataset[index]
        return to_rgb(image), int(label)

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"


def _open_named(data: str, root: str | None, split: str) -> Source:
    if data.startswith("hfds/") and importlib.util.find_spec("datasets") is None:
        raise UsageError(f"{data} needs the package datasets: pip install datasets")
    try:
        dataset = create_dataset(data, root=root, split="validation" if split == "val" else split)
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UsageError(
            f"cannot open {data} ({split}): {reason}; --data-root says where it is"
        ) from None
    if data.startswith("torch/"):
        return _Torchvision(dataset, data)
    return _Files(dataset.reader, _class_names(dataset.reader.class_to_idx))


def _open_folder(path: Path, split: str) -> Source:
    if not path.is_dir():
        raise UsageError(f"no data at {path}: --data takes {_FORMS}")
    folder = next((path / name for name in SPLITS[split] if (path / name).is_dir()), None)
    if folder is None:
        wanted = " or ".join(f"{name}/" for name in SPLITS[split])
        raise UsageError(f"{path} has no {wanted}: put one folder per class there")
    try:
        reader = create_dataset("", root=str(folder), search_split=False).reader
    except RuntimeError as error:
        raise UsageError(str(error)) from None
    _check_folders(folder, reader)
    return _Files(reader, _class_names(reader.class_to_idx))


def _check_folders(folder: Path, reader: Any) -> None:
    start = len(str(folder)) + 1
    used = {path[start:].split(os.sep, 1)[0] for path, _ in reader.samples}
    empty = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    empty = [name for name in empty if name not in used and not name.startswith(".")]
    if empty:
        raise UsageError(
            f"no images in {folder / empty[0]} ({len(empty)} empty class folders in all): "
            "add images or delete the folder"
        )
    if "" in reader.class_to_idx:
        raise UsageError(f"{folder} holds images outside of class folders: one folder per class")


def _class_names(class_to_idx: dict[str, int] | None) -> tuple[str, ...] | None:
    return tuple(sorted(class_to_idx, key=class_to_idx.__getitem__)) if class_to_idx else None
