"""Data sets of other libraries: torchvision, Hugging Face datasets, TensorFlow Datasets.

All of them with random access, so that their order and a resumed run are as exact as a folder's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image
from timm.data import create_dataset

from .errors import UsageError

_PACKAGES = {
    "torch": ("torchvision", "torchvision"),
    "hfds": ("datasets", "datasets"),
    "tfds": ("tensorflow_datasets", "tensorflow-datasets array-record"),
}
LIBRARIES = tuple(_PACKAGES)


@dataclass(frozen=True)
class Library:
    """A data set of another library, as a `Source`.

    Args:
        dataset: What holds the examples.
        title: The name of the data set, for messages.
        classes: The class names, None where the library does not tell.
        pick: Takes the image and the class from an example.
    """

    dataset: Any
    title: str
    classes: tuple[str, ...] | None
    pick: Callable[[Any], tuple[Image.Image, int]]

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image `index` and its class."""
        image, label = self.pick(self.dataset[index])
        return image, int(label)

    def name(self, index: int) -> str:
        """The data set and the index."""
        return f"{self.title}[{index}]"


def open_library(data: str, root: str | None, names: Sequence[str]) -> Library:
    """Open one split of a data set by timm's name for it.

    Args:
        data: `torch/...`, `hfds/...` or `tfds/...`.
        root: Where the data set lies or is cached.
        names: What the split may be called.

    Raises:
        UsageError: The library is not installed, or cannot open the split.
    """
    kind, _, name = data.partition("/")
    module, packages = _PACKAGES[kind]
    if importlib.util.find_spec(module) is None:
        raise UsageError(f"{data} needs another library: pip install {packages}")
    opener = {"torch": _open_torch, "hfds": _open_hugging_face, "tfds": _open_tensorflow}[kind]
    try:
        return opener(name, root, names)
    except UsageError:
        raise
    except Exception as error:  # every library has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"cannot open {data} ({names[0]}): {reason[:300]}; --data-root says where it is"
        ) from None


def _open_torch(name: str, root: str | None, names: Sequence[str]) -> Library:
    dataset = create_dataset(f"torch/{name}", root=root, split=names[0])
    classes = getattr(dataset, "classes", None)
    return Library(dataset, f"torch/{name}", tuple(map(str, classes)) if classes else None, tuple)


def _open_hugging_face(name: str, root: str | None, names: Sequence[str]) -> Library:
    import datasets

    split = _choose(names, datasets.get_dataset_split_names(name, cache_dir=root))
    dataset = datasets.load_dataset(name, split=split, cache_dir=root)
    image, label = (_feature(dataset.features, kind) for kind in ("Image", "ClassLabel"))
    pick = partial(_pick_row, image=image, label=label)
    return Library(dataset, f"hfds/{name}", tuple(dataset.features[label].names), pick)


def _open_tensorflow(name: str, root: str | None, names: Sequence[str]) -> Library:
    import tensorflow_datasets

    # the only one of its file formats with random access
    builder = tensorflow_datasets.builder(name, data_dir=root, file_format="array_record")
    image, label = (_feature(builder.info.features, kind) for kind in ("Image", "ClassLabel"))
    source = builder.as_data_source(split=_choose(names, builder.info.splits))
    classes = tuple(builder.info.features[label].names)
    return Library(source, f"tfds/{name}", classes, partial(_pick_array, image=image, label=label))


def _choose(names: Sequence[str], present: Any) -> str:
    for name in names:
        if name in present:
            return name
    raise UsageError(f"the data set has no split {names[0]}, only {', '.join(present)}")


def _feature(features: Any, kind: str) -> str:
    """The first field of a kind, by the name of its class, which the libraries share."""
    for name, feature in features.items():
        if type(feature).__name__ == kind:
            return name
    raise UsageError(f"the data set has no {kind} field, only {', '.join(features)}")


def _pick_row(row: dict[str, Any], image: str, label: str) -> tuple[Image.Image, int]:
    return row[image], row[label]


def _pick_array(example: dict[str, Any], image: str, label: str) -> tuple[Image.Image, int]:
    pixels = example[image]
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels), example[label]
