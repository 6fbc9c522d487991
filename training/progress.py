"""Where a run is, and how it is told: the epoch's row and the lines a person reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from .console import duration
from .data import BadFiles
from .evaluate import Score
from .run_folder import Row
from .sampler import TrainOrder


@dataclass
class Progress:
    """Where the run is; saved with every checkpoint.

    Args:
        step: Steps done.
        evaluated: The step whose weights were evaluated last.
        skipped: Steps left out because something was not finite.
        streak: The last of them in a row.
        best_top1: The best accuracy, percent, of the model or of its average.
        best_step: Where it was reached.
        loss: Sum of the losses of this epoch.
        steps: Steps of this epoch that were taken.
        seconds: Time of this epoch's steps.
        wait: Part of it spent waiting for data.
        total_seconds: Time of the whole run, evaluations included.
    """

    step: int = 0
    evaluated: int = 0
    skipped: int = 0
    streak: int = 0
    best_top1: float = -1.0
    best_step: int = 0
    loss: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    wait: float = 0.0
    total_seconds: float = 0.0

    def finish_epoch(self, row: Row) -> None:
        """Note the evaluation in `row`, and begin the sums of the next epoch."""
        top1 = max(row.top1, row.top1_ema or 0.0)
        if math.isfinite(row.val_loss) and top1 > self.best_top1:
            self.best_top1, self.best_step = top1, row.step
        self.evaluated = self.step
        self.loss, self.steps, self.seconds, self.wait = 0.0, 0, 0.0, 0.0


def make_row(
    progress: Progress,
    order: TrainOrder,
    lr: float,
    score: Score,
    averaged: Score | None,
    bad: BadFiles,
) -> Row:
    """The row of `metrics.csv` for the epoch that has just been evaluated.

    Args:
        progress: Its sums.
        order: Its size.
        lr: The last learning rate.
        score: Of the model.
        averaged: Of the average of its weights, if there is one.
        bad: Unreadable training images.
    """
    images = order.batch_size * order.steps_per_epoch
    return Row(
        epoch=progress.step // order.steps_per_epoch,
        step=progress.step,
        lr=lr,
        train_loss=progress.loss / progress.steps if progress.steps else math.nan,
        val_loss=score.mean_loss,
        top1=score.top1_percent,
        top5=score.top5_percent,
        top1_ema=averaged.top1_percent if averaged else None,
        images_per_s=round(images / progress.seconds, 1),
        wait_percent=round(100 * progress.wait / progress.seconds, 1),
        skipped=progress.skipped,
        bad_images=len(bad.indices),
        seconds=round(progress.total_seconds, 1),
    )


def epoch_line(row: Row, epochs: int) -> str:
    """One epoch in one line.

    Args:
        row: The epoch.
        epochs: How many there are.
    """
    left = row.seconds / row.epoch * (epochs - row.epoch)
    average = "" if row.top1_ema is None else f" (average {row.top1_ema:.2f} %)"
    skipped = f"  {row.skipped} steps skipped" if row.skipped else ""
    return (
        f"epoch {row.epoch:>{len(str(epochs))}}/{epochs}  loss {row.train_loss:.3f}  "
        f"validation {row.val_loss:.3f}  top-1 {row.top1:.2f} %{average}  lr {row.lr:.1e}  "
        f"{row.images_per_s:.0f} images/s  waiting {row.wait_percent:.0f} %  left {duration(left)}"
        f"{skipped}"
    )


def result_line(row: Row, images: int, progress: Progress, folder: Path) -> str:
    """The whole run in one line.

    Args:
        row: The last epoch.
        images: Held-out images.
        progress: The best epoch and the time.
        folder: Where the files are.
    """
    best = progress.best_step * row.epoch // row.step
    return (
        f"top-1 {row.top1:.2f} % ({round(row.top1 * images / 100)} of {images} held-out images), "
        f"best {progress.best_top1:.2f} % after epoch {best}, in "
        f"{duration(progress.total_seconds)}; files in {folder}"
    )
