"""Where a run is, and how it is told: the epoch's row and the lines a person reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import Parsed, settings, to_dict
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


def settings_lines(parsed: Parsed[Any]) -> list[str]:
    """The settings that are not the defaults, one line per group.

    Args:
        parsed: All settings of the run.
    """
    changed: dict[str, list[str]] = {}
    values = to_dict(parsed.config)
    for setting in settings(type(parsed.config)).values():
        value = values[setting.group][setting.name]
        default = setting.default
        if value != (list(default) if isinstance(default, tuple) else default):
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            changed.setdefault(setting.group, []).append(f"{setting.name}={text}")
    return [f"  {group:<9}{' '.join(words)}" for group, words in changed.items()]


def step_note(progress: Progress, order: TrainOrder, total: int, loss: float) -> str:
    """How the epoch goes, after one of its steps.

    Args:
        progress: Where the run is.
        order: Its size.
        total: Steps of the run.
        loss: Of the step.
    """
    done = (progress.step - 1) % order.steps_per_epoch + 1
    speed = order.batch_size * done / progress.seconds
    left = progress.total_seconds / progress.step * (total - progress.step)
    return (
        f"loss {loss:.3f}, {speed:.0f} images/s, waiting "
        f"{100 * progress.wait / progress.seconds:.0f} %, left {duration(left)}"
    )


def summary_lines(rows: Sequence[Row], progress: Progress, memory: float | None) -> list[str]:
    """The best and the last epoch as a table, and what the run took.

    Args:
        rows: All epochs.
        progress: The best epoch and the time.
        memory: The most that was in use, MiB.
    """
    best = next((row for row in rows if row.step == progress.best_step), rows[-1])
    lines = [f"{'':4}{'epoch':>7}{'loss':>9}{'top-1':>9}{'top-5':>9}{'average':>9}"]
    for name, row in (("best", best), ("last", rows[-1])):
        average = "" if row.top1_ema is None else f"{row.top1_ema:.2f}"
        lines.append(
            f"{name}{row.epoch:>7}{row.val_loss:>9.4f}{row.top1:>9.2f}{row.top5:>9.2f}{average:>9}"
        )
    times = [1 / row.images_per_s for row in rows]
    waits = sum(row.wait_percent * time for row, time in zip(rows, times, strict=True)) / sum(times)
    used = "" if memory is None else f", {memory:.0f} MiB of memory at most"
    lines.append(
        f"{rows[-1].epoch} epochs in {duration(progress.total_seconds)}, "
        f"{len(times) / sum(times):.0f} images/s, waiting {waits:.0f} % for data{used}"
    )
    return lines


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
