"""Results of evaluations: table, JSON and CSV, accuracy by class, ImageNet's real labels."""

from __future__ import annotations

import csv
import importlib.resources
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .curves import draw_confusion
from .errors import StorageError, UsageError
from .sources import Source

COLUMNS = (
    "model", "weights", "data", "top1", "top1_err", "top5", "loss", "n", "unreadable", "real_top1",
    "real_top5", "real_n", "img_size", "crop_pct", "crop_mode", "interpolation", "params_M",
    "gmacs", "images_per_s", "peak_memory_MiB", "weights_sha256", "error",
)  # fmt: skip
CLASS_COLUMNS = ("class", "n", "top1", "confused_with", "confused")
_MOST_DRAWN = 50
_SHOWN = {
    "top1": ("top-1", 2), "top5": ("top-5", 2), "real_top1": ("real", 2), "loss": ("loss", 4),
    "n": ("images", 0), "img_size": ("size", 0), "gmacs": ("GMACs", 2),
    "images_per_s": ("img/s", 0),
}  # fmt: skip


class Table:
    """An aligned table whose rows are told one by one.

    Args:
        names: What the rows will be called.
        real: Whether they have the accuracy on real labels.
    """

    def __init__(self, names: Iterable[str], *, real: bool) -> None:
        self._width = max(5, *map(len, names))
        self._shown = {key: form for key, form in _SHOWN.items() if real or key != "real_top1"}

    def header(self) -> str:
        """The titles."""
        return "model".ljust(self._width) + "".join(f"{t:>9}" for t, _ in self._shown.values())

    def line(self, name: str, row: dict[str, Any]) -> str:
        """One result, or why there is none."""
        if "error" in row:
            return f"{name:<{self._width}}  error: {row['error']}"
        cells = (f"{row[key]:>9.{digits}f}" for key, (_, digits) in self._shown.items())
        return name.ljust(self._width) + "".join(cells)


class RealLabels:
    """All classes that can be seen in each image of ImageNet's validation set (Beyer et al. 2020).

    Args:
        file: JSON of a list of classes for each image in order of their numbers, or `imagenet` for
            the one that timm brings.
        source: The images; their files have ImageNet's names.

    Raises:
        UsageError: The file cannot be read, or an image has another name or no labels.
    """

    def __init__(self, file: str, source: Source) -> None:
        bundled = importlib.resources.files("timm.data") / "_info" / "imagenet_real_labels.json"
        try:
            known = json.loads((bundled if file == "imagenet" else Path(file)).read_text())
            self._classes = [set(known[_number(source.name(i)) - 1]) for i in range(len(source))]
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise UsageError(
                f"--real-labels {file} ({error}): use `imagenet`, or a JSON list of lists of "
                "classes in the order of ImageNet's validation images"
            ) from None

    def score(self, answers: Tensor) -> dict[str, float]:
        """Accuracies in percent, over the images that have a label.

        Args:
            answers: `(N, 2 + k)`, see `Evaluator.answers`.
        """
        pairs = [(self._classes[image], best) for image, _, *best in answers.tolist()]
        pairs = [(classes, best) for classes, best in pairs if classes]
        hits = {k: sum(not classes.isdisjoint(best[:k]) for classes, best in pairs) for k in (1, 5)}
        shares = {f"real_top{k}": 100 * count / max(1, len(pairs)) for k, count in hits.items()}
        return shares | {"real_n": len(pairs)}


def class_rows(answers: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """Accuracy of each class and what it is taken for most, the worst class first.

    Args:
        answers: `(N, 2 + k)`, see `Evaluator.answers`.
        names: Of the classes.
    """
    rows = []
    for label in answers[:, 1].unique().tolist():
        taken = Counter(answers[answers[:, 1] == label, 2].tolist())
        count, right = taken.total(), taken.pop(label, 0)
        wrong, times = taken.most_common(1)[0] if taken else (None, 0)
        other = "" if wrong is None else names[wrong]
        values = (names[label], count, 100 * right / count, other, times)
        rows.append(dict(zip(CLASS_COLUMNS, values, strict=True)))
    return sorted(rows, key=lambda row: row["top1"])


def write_classes(answers: Tensor, classes: Sequence[str] | None, stem: Path) -> None:
    """Write `<stem>-classes.csv` and, for up to 50 classes, `<stem>-confusion.png`.

    Args:
        answers: `(N, 2 + k)`, see `Evaluator.answers`.
        classes: Their names; none: their numbers.
        stem: Folder and beginning of the names of the files.
    """
    names = classes or [str(number) for number in range(int(answers[:, 1:3].max()) + 1)]
    rows = class_rows(answers, names)
    write_csv(stem.with_name(f"{stem.name}-classes.csv"), rows, CLASS_COLUMNS)
    if len(names) <= _MOST_DRAWN:
        draw_confusion(answers, names, stem.with_name(f"{stem.name}-confusion.png"))


def write_json(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a list of results, whether there is one or several."""
    _write(path, json.dumps(rows, indent=1) + "\n")


def write_csv(path: Path, rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> None:
    """Write rows; what a row lacks is left empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(path, text.getvalue())


def peak_memory(device: torch.device) -> float | None:
    """The most memory in use so far, MiB: of a CUDA device, or of this process; none on Windows."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def _number(name: str) -> int:
    found = re.search(r"ILSVRC2012_val_(\d{8})", name)
    if found is None:
        raise ValueError(f"{name} is not called as ILSVRC2012_val_00000001.JPEG is")
    return int(found[1])


def _write(path: Path, text: str) -> None:
    try:
        checkpoint.replace_file(path, text.encode())
    except OSError as error:
        raise StorageError(f"cannot write {path} ({error.strerror}): use --json FILE") from error
