"""What a start from trained weights is worth: digits to Fashion-MNIST, three ways, one budget.

    python train.py --out runs/digits
    python examples/finetune_fashion.py runs/digits

trains SHViT-S1 on a few images of Fashion-MNIST from scratch, from the digits, and only its
classifier on top of the digits' features. Settings and images are the same, seeded. The images
come from the Debian package `dataset-fashion-mnist`, downloaded and unpacked without installing
it, or from a folder with its four files.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from backbones.training.runtime import versions

ROOT = Path(__file__).parents[1]
CLASSES = (
    "top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
PACKAGE, FOLDER = "dataset-fashion-mnist", "usr/share/datasets/fashion-mnist"
WAYS = {
    "from scratch": [],
    "fine-tuned from the digits": ["--finetune", "{digits}"],
    "classifier only, on the digits' features": ["--finetune", "{digits}", "--head-only"],
}
# as the digits were seen
VIEW = ["--img-size", "32", "--crop-pct", "1", "--interpolation", "bilinear"]
VIEW += ["--mean", "0.3,0.3,0.3", "--std", "0.35,0.35,0.35", "--geometry", "affine"]


def find_fashion(given: Path | None, work: Path) -> Path:
    """The folder with the four files: `given`, the installed package's, or the package's here.

    Args:
        given: A folder with the files, if the user has one.
        work: Where the package is unpacked.
    """
    for folder in (given, Path("/") / FOLDER, work / FOLDER):
        if folder and (folder / "t10k-labels-idx1-ubyte.gz").is_file():
            return folder
    work.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", PACKAGE], cwd=work, check=True)
        subprocess.run(
            ["dpkg", "-x", *(p.name for p in work.glob("*.deb")), "."], cwd=work, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"no {PACKAGE} ({error}): give a folder with --fashion") from None
    return work / FOLDER


def write_images(source: Path, name: str, target: Path, count: int, seed: int) -> None:
    """Write the first images of a seeded permutation as one folder of PNG files per class.

    Args:
        source: The folder with the four files.
        name: `train` or `t10k`.
        target: What to write.
        count: How many images.
        seed: Of the permutation.
    """
    with gzip.open(source / f"{name}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(source / f"{name}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    for label in CLASSES:
        (target / label).mkdir(parents=True, exist_ok=True)
    for index in np.random.RandomState(seed).permutation(len(images))[:count]:
        path = target / CLASSES[labels[index]] / f"{index:05d}.png"
        Image.fromarray(images[index]).save(path)


def train(argv: list[str], out: Path) -> list[float]:
    """Run `train.py` and return its top-1 after every epoch, percent.

    Args:
        argv: Its settings.
        out: Its run folder; a run that is there already is continued, or read if it is done.
    """
    command = [sys.executable, str(ROOT / "train.py"), *argv, "--out", str(out)]
    subprocess.run(command, check=True)
    with (out / "metrics.csv").open(newline="") as file:
        return [float(row["top1"]) for row in csv.DictReader(file)]


def draw(results: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw top-1 over epochs, a line for each way.

    Args:
        results: What was measured.
        title: Above the picture.
        path: A PNG file.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="epoch", ylabel="top-1, %")
    for result in results:
        epochs = range(1, len(result["top1_by_epoch"]) + 1)
        label = f"{result['way']}: {result['top1']:.1f} %"
        axes.plot(epochs, result["top1_by_epoch"], "o-", label=label)
    axes.set_xticks(list(epochs))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run all three, and write the result and its picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("digits", type=Path, help="run folder of `python train.py`")
    parser.add_argument("--fashion", type=Path, help="folder with the four files of the data set")
    parser.add_argument("--work", type=Path, default=Path("runs/fashion"), help="where to work")
    parser.add_argument("--images", type=int, default=1000, help="training images [1000]")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each way [3]")
    parser.add_argument("--val", type=int, default=2000, help="held-out images [2000]")
    parser.add_argument("--write", action="store_true", help="add to benchmarks/results")
    given = parser.parse_args()

    source = find_fashion(given.fashion, given.work)
    data = given.work / f"images-{given.images}"
    write_images(source, "train", data / "train", given.images, seed=0)
    write_images(source, "t10k", data / "val", given.val, seed=0)
    settings = ["--data", str(data), "--epochs", str(given.epochs), *VIEW]
    results = []
    for number, (way, argv) in enumerate(WAYS.items()):
        out = given.work / f"run-{given.images}x{given.epochs}-{number}"
        curve = train([*settings, *(word.format(digits=given.digits) for word in argv)], out)
        results.append({"way": way, "argv": argv, "top1": curve[-1], "top1_by_epoch": curve})
        print(f"{way}: top-1 {curve[-1]:.2f} %")
    name = f"{given.images} images x {given.epochs} epochs"
    report = {
        "budget": name,
        "held_out": given.val,
        # train.py's other settings are its defaults
        "settings": settings[2:],
        "ways": results,
        "versions": {"python": platform.python_version(), **versions()},
        "device": f"CPU, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }
    folder = ROOT / "benchmarks/results" if given.write else given.work
    draw(results, f"Fashion-MNIST, {name}", folder / "finetune_fashion.png")
    path = folder / "finetune_fashion.json"
    reports = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(reports | {name: report}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
