"""All settings of a training run, each group from the file of the component that it sets."""

from __future__ import annotations

from dataclasses import dataclass

from .augment import AugmentConfig
from .data import DataConfig
from .model import TrainModelConfig
from .optim import EmaConfig, OptimConfig
from .run_folder import RunConfig
from .runtime import RuntimeConfig
from .schedule import ScheduleConfig


@dataclass(frozen=True)
class TrainConfig:
    """All settings of `train.py`."""

    model: TrainModelConfig
    data: DataConfig
    augment: AugmentConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    ema: EmaConfig
    runtime: RuntimeConfig
    run: RunConfig
