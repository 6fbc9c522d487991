"""F6: thirty kinds of odd image files in a folder to train on."""

from __future__ import annotations

import functools
import io
import os
import signal
import struct
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from tests.faults.client import obey_modes
from tests.faults.lab import Case, Lab
from tests.faults.sabotage import Fault, train_with
from tests.faults.trained import one_line, processes
from tests.support.images import encode, make_folder
from tests.support.runs import Finished, run

_RGB = Image.fromarray((np.arange(64 * 64 * 3).reshape(64, 64, 3) % 251).astype(np.uint8))
_PNG, _JPEG = encode(_RGB), encode(_RGB, "JPEG")
_ARGV = ("--model", "test_byobnet", "--img-size", 32, "--batch-size", 9, "--warmup-epochs", 0)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"".join(
        [_PNG[:8], _chunk(b"IHDR", head), _chunk(b"IDAT", zlib.compress(b"")), _chunk(b"IEND", b"")]
    )


def _animated() -> bytes:
    buffer = io.BytesIO()
    frames = [_RGB.convert("P"), _RGB.rotate(90).convert("P")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def _rotated() -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    _RGB.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def _grey16() -> bytes:
    return encode(Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16))


# kind -> name and content of files that can be read, as whatever they are
READABLE: dict[str, tuple[str, bytes]] = {
    "PNG called .jpg": ("png.jpg", _PNG),
    "JPEG called .png": ("jpeg.png", _JPEG),
    "CMYK": ("cmyk.jpg", encode(_RGB.convert("CMYK"), "JPEG")),
    "16 bits": ("grey16.png", _grey16()),
    "palette": ("palette.png", encode(_RGB.convert("P"))),
    "grey and alpha": ("la.png", encode(_RGB.convert("LA"))),
    "colour and alpha": ("rgba.png", encode(_RGB.convert("RGBA"))),
    "one bit": ("bit.png", encode(_RGB.convert("1"))),
    "one pixel": ("pixel.png", encode(_RGB.crop((0, 0, 1, 1)))),
    "animation called .png": ("gif.png", _animated()),
    "rotated by EXIF": ("exif.jpg", _rotated()),
}
# those that cannot
BROKEN: dict[str, tuple[str, bytes]] = {
    "text": ("text.png", b"this is not an image\n"),
    "web page": ("page.jpg", b"<html><body>403 Forbidden</body></html>"),
    "empty": ("empty.png", b""),
    "zeros": ("zeros.jpg", bytes(2000)),
    "header alone": ("header.png", _PNG[:33]),
    "damaged in the middle": ("middle.png", _PNG[:200] + bytes(100) + _PNG[300:]),
    "no pixels wide": ("zero.png", _png(0, 10)),
    "bomb": ("bomb.png", _png(60_000, 60_000)),
    **{
        f"PNG cut at {tenth} tenths": (f"cut{tenth}.png", _PNG[: len(_PNG) * tenth // 10])
        for tenth in (1, 3, 5, 7, 9)
    },
    **{
        f"JPEG cut at {tenth} tenths": (f"cut{tenth}.jpg", _JPEG[: len(_JPEG) * tenth // 10])
        for tenth in (1, 3, 5, 7, 9)
    },
}
# no files of images at all: made by `_make`, listed or not
_LISTED, _UNLISTED = ("link.png", "forbidden.png"), ("folder.png",)


def _make(root: Path) -> Path:
    """A folder of 108 images and of one file of every kind, 4 x 9 more."""
    folder = make_folder(root, train=54, val=4) / "train" / "cat"
    for name, content in (READABLE | BROKEN).values():
        (folder / name).write_bytes(content)
    (folder / "link.png").symlink_to("nowhere.png")
    (folder / "folder.png").mkdir()
    (folder / "forbidden.png").write_bytes(_PNG)
    (folder / "forbidden.png").chmod(0)
    # only whole batches are seen in an epoch
    for number in range(-len(list((root / "train").rglob("*.??g"))) % 9 + 1):
        (folder / f"more{number}.png").write_bytes(_PNG)
    return root


def train_with_modes(faults: Sequence[Fault], argv: Sequence[str]) -> int:
    """Run train.py with faults, by a user who is not root."""
    if os.geteuid() == 0:
        obey_modes()
    return train_with(faults, argv)


def _train(folder: Path, data: Path, *argv: object, faults: Sequence[Fault] = ()) -> Finished:
    argv = (*_ARGV, *processes(1), "--data", data, "--epochs", 1, "--out", "out", *argv)
    return run(partial(train_with_modes, faults), *argv, folder=folder)


@functools.cache
def _trained(lab: Lab, max_bad: float, workers: int) -> tuple[Path, Finished]:
    folder = lab.folder / f"images-{max_bad}-{workers}"
    data = _make(folder / "data")
    done = _train(folder, data, "--max-bad", max_bad, "--workers", workers)
    return folder / "out", done


def _listed(folder: Path) -> dict[str, str]:
    lines = (folder / "bad_files.txt").read_text().splitlines()
    return {Path(file).name: why for file, why in (line.split("\t") for line in lines)}


def _met(name: str, broken: bool, lab: Lab) -> str:
    """Train for an epoch: nothing crashes, and a file is in the list if it is broken."""
    folder, done = _trained(lab, 0.5, 1)
    if done.code:
        return f"exit code {done.code}: {done.err}"
    listed = _listed(folder)
    if (name in listed) != broken:
        return f"{name} is {'not ' if broken else ''}in the list: {listed.get(name)}"
    return "" if not broken or listed[name] else "no reason is given"


def _exact(folder: Path) -> str:
    """The list holds the broken files and nothing else, and the table counts them."""
    expected = {name for name, _ in BROKEN.values()} | set(_LISTED)
    if _listed(folder).keys() != expected:
        return f"listed: {sorted(_listed(folder).keys() ^ expected)}"
    header, row = (line.split(",") for line in (folder / "metrics.csv").read_text().split())
    count = dict(zip(header, row, strict=True))["bad_images"]
    return "" if count == str(len(expected)) else f"metrics.csv counts {count}"


def _resumed(lab: Lab) -> str:
    """Kill a run that has met some: the next one still lists them."""
    folder = lab.folder / "images-killed"
    argv = ["--max-bad", 0.5, "--workers", 0, "--checkpoint-every", 3]
    data = _make(folder / "data")
    if _train(folder, data, *argv, faults=[Fault("kill", 10)]).code != -signal.SIGKILL:
        return "was not killed"
    done = _train(folder, data, *argv)
    return done.err if done.code else _exact(folder / "out")


def _limited(lab: Lab) -> str:
    """More than --max-bad of them end the run."""
    _, done = _trained(lab, 0.05, 0)
    if done.code != 2 or "training images cannot be read" not in done.err:
        return f"exit code {done.code}: {done.err}"
    return one_line(done)


CASES: dict[str, Case] = {
    **{kind: partial(_met, name, False) for kind, (name, _) in READABLE.items()},
    **{kind: partial(_met, name, True) for kind, (name, _) in BROKEN.items()},
    "dangling link": partial(_met, "link.png", True),
    "no permission": partial(_met, "forbidden.png", True),
    "folder called .png": partial(_met, "folder.png", False),
    "all of them: the list is exact": lambda lab: _exact(_trained(lab, 0.5, 1)[0]),
    "all of them: the list after a kill": _resumed,
    "all of them: above the limit": _limited,
}
