"""Where images come from: the built-in digits, folders, shards, and other libraries."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from timm.data import create_dataset

from .digits import Digits
from .errors import UsageError
from .libraries import LIBRARIES, open_library
from .shards import Shards, find_shards

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "test"),
}
_FORMS = (
    "a folder with train/ and val/, hfds/user/name, tfds/name, torch/name, wds/name with "
    "--data-root, or digits"
)


class Source(Protocol):
    """A data set with random access."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The class names in order of their numbers, none where the data set does not tell."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image `index` and its class; any exception means that the file is unreadable."""

    def name(self, index: int) -> str:
        """The file, or another name, of image `index`."""


def open_source(data: str, root: str | None, split: str) -> Source:
    """Open one half of a data set.

    Args:
        data: `digits`, a folder in ImageNet layout, or a data set name of timm's.
        root: Where a named data set lies or is cached.
        split: `train` or `val`.

    Raises:
        UsageError: Nothing there, no such split, no images, an empty class folder.
    """
    if data == "digits":
        return Digits(train=split == "train")
    kind, slash, _ = data.partition("/")
    if not slash or Path(data).exists():
        return _open_folder(Path(data), split)
    if kind in LIBRARIES:
        return open_library(data, root, SPLITS[split])
    if kind == "wds":
        return _open_shards(data, root, split)
    if kind == "hfids":
        raise UsageError(f"{data}: a stream cannot be resumed exactly; use hfds/ instead of hfids/")
    return _open_folder(Path(data), split)


def read_image(source: Source, index: int) -> tuple[Image.Image, int]:
    """Decode the image `index` of `source`; any exception means that the file is unreadable.

    Returns:
        The image in RGB, and its class.
    """
    image, label = source.load(index)
    return to_rgb(image), label


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
            image.load()
            return image, int(label)

    def name(self, index: int) -> str:
        return self.reader.filename(index, absolute=True)


def _open_shards(data: str, root: str | None, split: str) -> Source:
    if root is None or "://" in root:
        raise UsageError(f"{data} needs --data-root FOLDER, where the shards lie on this machine")
    return Shards(find_shards(Path(root), SPLITS[split]))


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
        raise UsageError(f"{error}: put one folder of images per class there") from None
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
