"""The learning curves of a run and the confusion of its classes as pictures."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from .run_folder import Row

_BLUE, _ORANGE, _GREY = "#2a6fbb", "#d9702b", "#666666"
_LARGEST_SHARE = 0.05


class Curves:
    """Keeps `curves.png` up to date, and a log for TensorBoard where that is installed.

    A disk that cannot take them does not end the run.

    Args:
        folder: Of the run.
        title: Above the picture.
    """

    def __init__(self, folder: Path, title: str) -> None:
        self._folder = folder
        self._title = title
        self._writer: Any = None
        self._drawn = 0
        self._draw_again_at = 0.0

    def update(self, rows: Sequence[Row]) -> None:
        """Log the last epoch, and draw all unless drawing would take more than 5 % of the time.

        Args:
            rows: One per epoch.
        """
        with contextlib.suppress(OSError, ImportError):
            self._log(rows[-1])
        if time.monotonic() >= self._draw_again_at:
            self._draw(rows)

    def finish(self, rows: Sequence[Row]) -> None:
        """Draw what is not drawn yet."""
        if len(rows) != self._drawn:
            self._draw(rows)

    def _draw(self, rows: Sequence[Row]) -> None:
        begin = time.monotonic()
        with contextlib.suppress(OSError):
            draw_curves(rows, self._title, self._folder / "curves.png")
        self._drawn, end = len(rows), time.monotonic()
        self._draw_again_at = end + (end - begin) / _LARGEST_SHARE

    def _log(self, row: Row) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # what an interrupted run logged after its last checkpoint is not shown
            self._writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=row.step)
        for item in fields(row):
            value = getattr(row, item.name)
            if value is not None:
                self._writer.add_scalar(item.name, value, row.step)
        self._writer.flush()


def draw_curves(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw loss, top-1 accuracy and learning rate over the epochs.

    Args:
        rows: One per epoch.
        title: Above the picture.
        path: PNG file to write.
    """
    # imported here: most processes never draw
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    loss, accuracy, rate = figure.subplots(1, 3)
    epochs = [row.epoch for row in rows]
    _line(loss, epochs, [row.train_loss for row in rows], "training", _BLUE)
    _line(loss, epochs, [row.val_loss for row in rows], "validation", _ORANGE)
    _line(accuracy, epochs, [row.top1 for row in rows], "model", _ORANGE)
    averaged = any(row.top1_ema is not None for row in rows)
    if averaged:
        _line(accuracy, epochs, [row.top1_ema for row in rows], "average of weights", _BLUE)
    _line(rate, epochs, [row.lr for row in rows], None, _GREY)
    _finish(loss, "loss (nats)", legend=True)
    _finish(accuracy, "top-1 (%)", legend=averaged)
    _finish(rate, "learning rate", legend=False)
    if rows:
        _mark_best(accuracy, rows)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    figure.savefig(path, dpi=110)


def draw_confusion(answers: Tensor, names: Sequence[str], path: Path) -> None:
    """Draw how often each class is taken for each other, in percent of its images.

    Args:
        answers: `(N, 2 + k)`, see `Evaluator.answers`.
        names: Of the classes.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(names)
    pairs = answers[:, 1] * count + answers[:, 2]
    matrix = pairs.bincount(minlength=count * count).reshape(count, count).double()
    matrix *= 100 / matrix.sum(dim=1, keepdim=True).clamp(min=1)
    side = 3 + 0.42 * count
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=100)
    for row, column in (matrix >= 0.5).nonzero().tolist():
        share = float(matrix[row, column])
        color = "white" if share > 50 else "black"
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(count), names, rotation=90, fontsize=8)
    axes.set_yticks(range(count), names, fontsize=8)
    axes.set_xlabel("taken for (% of the class)")
    axes.set_ylabel("class")
    figure.savefig(path, dpi=110)


def _line(axes: Any, x: list[int], y: list[Any], label: str | None, color: str) -> None:
    axes.plot(x, y, color=color, label=label, linewidth=1.8, marker="o", markersize=3)


def _mark_best(axes: Any, rows: Sequence[Row]) -> None:
    best = max(rows, key=lambda row: row.top1)
    axes.annotate(
        f"{best.top1:.2f} %",
        (best.epoch, best.top1),
        xytext=(0, -16),
        textcoords="offset points",
        ha="center",
        color=_ORANGE,
    )


def _finish(axes: Any, label: str, *, legend: bool) -> None:
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if legend:
        axes.legend(frameon=False)
