"""The built-in data set: 1,797 handwritten digits of 8x8 pixels in 10 classes.

Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, doi:10.24432/C50P49, licence CC BY 4.0: the copy of 1,797 images that scikit-learn
ships. `digits.npz` holds the images (grey values 0..16), the labels, the fixed permutation whose
first 1,437 entries are for training, and this licence note.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

_TRAIN = 1437


class Digits:
    """The training or the held-out part of the digits.

    Args:
        train: The 1,437 training images, else the 360 held-out ones.
    """

    classes = tuple("0123456789")

    def __init__(self, train: bool) -> None:
        with np.load(Path(__file__).with_name("digits.npz")) as data:
            order = data["permutation"]
            chosen = order[:_TRAIN] if train else order[_TRAIN:]
            grey = np.round(data["images"][chosen] * (255 / 16)).astype(np.uint8)
            self._labels = data["labels"][chosen].tolist()
        self._images = [Image.fromarray(image).convert("RGB") for image in grey]

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image of 8x8 pixels and its class."""
        return self._images[index], self._labels[index]

    def name(self, index: int) -> str:
        """A name for messages."""
        return f"digit {index}"
