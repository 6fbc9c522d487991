"""The learning rate as a closed form of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import option, require


@dataclass(frozen=True)
class ScheduleConfig:
    """How long to train, and the course of the learning rate."""

    name: str = option("cosine", "course after the warm-up", choices=("cosine", "step", "constant"))
    epochs: int = option(12, "length of the training, warm-up included")
    cooldown_epochs: int = option(0, "more epochs after these, at min_lr")
    warmup_epochs: float = option(1.0, "linear warm-up")
    warmup_lr: float = option(1e-6, "learning rate at the first step of the warm-up")
    min_lr: float = option(1e-5, "learning rate at the end of the cosine")
    step_epochs: float = option(30.0, "step: epochs between two decays")
    step_decay: float = option(0.1, "step: factor of a decay")
    per: str = option(
        "step",
        "how often the learning rate changes",
        flag="schedule_per",
        choices=("step", "epoch"),
    )

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"--epochs must be at least 1, not {self.epochs}")
        require(
            0 <= self.warmup_epochs < self.epochs,
            f"--warmup-epochs {self.warmup_epochs} must be less than --epochs {self.epochs}",
        )
        require(self.cooldown_epochs >= 0, f"--cooldown-epochs is negative: {self.cooldown_epochs}")
        for name in ("warmup_lr", "min_lr", "step_decay"):
            value = getattr(self, name)
            require(value >= 0, f"schedule.{name} must not be negative: {value}")
        require(self.step_epochs > 0, f"--step-epochs must be positive, not {self.step_epochs}")

    @property
    def total_epochs(self) -> int:
        """Length of the run, cooldown included."""
        return self.epochs + self.cooldown_epochs


def learning_rate(config: ScheduleConfig, peak: float, step: int, steps_per_epoch: int) -> float:
    """The learning rate of one step.

    With `per: epoch` the rate stays constant within an epoch, as in timm and DeiT. Also as there,
    the cosine spans all epochs but the cooldown, and the warm-up covers its beginning.

    Args:
        config: The course.
        peak: Learning rate where the warm-up ends.
        step: Number of the step, from 0.
        steps_per_epoch: Steps of an epoch.
    """
    time = step // steps_per_epoch if config.per == "epoch" else step / steps_per_epoch
    if time < config.warmup_epochs:
        return config.warmup_lr + (peak - config.warmup_lr) * time / config.warmup_epochs
    if time >= config.epochs:
        return config.min_lr
    if config.name == "constant":
        return peak
    if config.name == "step":
        return peak * config.step_decay ** (time // config.step_epochs)
    return config.min_lr + (peak - config.min_lr) * _half_cosine(time / config.epochs)


def _half_cosine(part: float) -> float:
    return (1 + math.cos(math.pi * part)) / 2
