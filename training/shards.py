"""WebDataset shards on disk, with random access.

A shard is a tar file of samples: neighbouring members that share a name up to the first dot, one of
them the image, one of them its class (https://github.com/webdataset/webdataset). Reading shards in
their own order gives neither an exact shuffle nor an exact resume; so they are indexed once, by
their headers, and images are then read by offset, in any order.
"""

from __future__ import annotations

import io
import json
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from .errors import UsageError

_IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp")
_INFO = ("_info.json", "info.json")


class Shards:
    """The samples of some shards, as a `Source`.

    Args:
        paths: The tar files.

    Raises:
        UsageError: A file is no tar file, or a sample has no class.
    """

    classes = None

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._keys: list[str] = []
        # shard, offset, size, class of each sample: few bytes, for there may be millions
        self._index = array("q")
        for number, path in enumerate(tqdm(paths, "indexing shards", leave=False, disable=None)):
            try:
                for key, image, label in _samples(path):
                    self._keys.append(key)
                    self._index.extend((number, image.offset_data, image.size, label))
            except (tarfile.TarError, OSError) as error:
                raise UsageError(f"{path} is not a readable tar file: {error}") from None

    def __len__(self) -> int:
        return len(self._keys)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image `index` and its class."""
        shard, offset, size, label = self._index[4 * index : 4 * index + 4]
        with self._paths[shard].open("rb") as file:
            file.seek(offset)
            return Image.open(io.BytesIO(file.read(size))), label

    def name(self, index: int) -> str:
        """The shard of sample `index` and its name there."""
        return f"{self._paths[self._index[4 * index]]}:{self._keys[index]}"


def find_shards(root: Path, names: Sequence[str]) -> list[Path]:
    """The shards of one split.

    Args:
        root: The folder of the data set. `_info.json` in it lists the shards of each split, as timm
            writes it; else their own names or folders do.
        names: What the split may be called, e.g. `("val", "validation")`.

    Raises:
        UsageError: There are none, or `_info.json` is damaged.
    """
    for info in (root / name for name in _INFO if (root / name).is_file()):
        try:
            splits = json.loads(info.read_text())["splits"]
            listed = [splits[name]["filenames"] for name in names if name in splits]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{info} does not list splits and filenames ({error!r}): correct or delete it"
            ) from None
        if listed:
            return [root / file for file in listed[0]]
    for name in names:
        found = sorted([*root.glob(f"{name}/*.tar"), *root.glob(f"*{name}*.tar")])
        if found:
            return found
    raise UsageError(
        f"no shards of {names[0]} in {root}: name them {names[0]}-0000.tar and so on, put them in "
        f"{names[0]}/, or list them in _info.json"
    )


def _samples(path: Path) -> Iterator[tuple[str, tarfile.TarInfo, int]]:
    """The name, the image and the class of each sample; samples without an image are left out."""
    with tarfile.open(path) as tar:
        for key, members in _groups(tar):
            image = next((members[name] for name in _IMAGES if name in members), None)
            if image is not None:
                yield key, image, _label(path, tar, key, members.get("cls"))


def _groups(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The members of each sample by their extension."""
    current, members = "", dict[str, tarfile.TarInfo]()
    for member in tar:
        folder, slash, file = member.name.rpartition("/")
        stem, _, extension = file.partition(".")
        key = folder + slash + stem
        if key != current and members:
            yield current, members
            members = {}
        current = key
        if member.isfile():
            members[extension.lower()] = member
    if members:
        yield current, members


def _label(path: Path, tar: tarfile.TarFile, key: str, member: tarfile.TarInfo | None) -> int:
    file = tar.extractfile(member) if member else None
    if file is None:
        raise UsageError(f"{path}: sample {key} has no class: add {key}.cls to the shard")
    text = file.read().decode(errors="replace")
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{path}: {key}.cls holds {text[:20]!r}, not a class number") from None
