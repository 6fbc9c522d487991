"""Small image folders, whole and broken, made with Pillow at test time."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog")


def make_folder(
    root: Path, train: int = 16, val: int = 4, classes: tuple[str, ...] = CLASSES
) -> Path:
    """An ImageNet-like folder; the classes differ in brightness, so that they can be learnt."""
    random = np.random.RandomState(0)
    for split, count in (("train", train), ("val", val)):
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.randint(0, 100, (36, 44, 3)) + 150 * number
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i:03d}.png")
    return root


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    """A tar file of `members`, name -> content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def make_shards(folder: Path, root: Path, size: int = 12) -> Path:
    """The images of an ImageNet-like folder as WebDataset shards, in the same order."""
    for split in ("train", "val"):
        files = sorted((folder / split).rglob("*.png"))
        classes = sorted({file.parent.name for file in files})
        for first in range(0, len(files), size):
            members = {}
            for file in files[first : first + size]:
                key = f"{file.parent.name}/{file.stem}"
                members[f"{key}.png"] = file.read_bytes()
                members[f"{key}.cls"] = str(classes.index(file.parent.name)).encode()
            write_shard(root / f"toy-{split}-{first:06d}.tar", members)
    return root


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def odd_files() -> dict[str, tuple[bytes, bool]]:
    """Files that test a reader: name -> content, and whether it is a readable image."""
    ramp = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    rgb = Image.fromarray((np.arange(64 * 64 * 3).reshape(64, 64, 3) % 251).astype(np.uint8))
    png, jpeg = encode(rgb), encode(rgb, "JPEG")
    files = {
        "rgb.png": (png, True),
        "rgb.jpg": (jpeg, True),
        "wrong_ending.jpg": (png, True),
        "grey.png": (encode(rgb.convert("L")), True),
        "grey_alpha.png": (encode(rgb.convert("LA")), True),
        "rgba.png": (encode(rgb.convert("RGBA")), True),
        "palette.png": (encode(rgb.convert("P")), True),
        "one_bit.png": (encode(rgb.convert("1")), True),
        "grey16.png": (encode(Image.fromarray(ramp)), True),
        "cmyk.jpg": (encode(rgb.convert("CMYK"), "JPEG"), True),
        "one_pixel.png": (encode(rgb.crop((0, 0, 1, 1))), True),
        "empty.png": (b"", False),
        "text.png": (b"this is not an image\n", False),
        "header_only.png": (png[:33], False),
        "zeros.jpg": (bytes(2000), False),
        "bad_data.png": (png[:200] + bytes(100) + png[300:], False),
    }
    for tenth in range(1, 10, 2):
        files[f"cut_{tenth}.png"] = (png[: len(png) * tenth // 10], False)
        files[f"cut_{tenth}.jpg"] = (jpeg[: len(jpeg) * tenth // 10], False)
    return files
