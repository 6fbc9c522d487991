"""All settings of a training run, each group from the file of the component that it sets."""

from __future__ import annotations

from dataclasses import dataclass

from .augment import AugmentConfig
from .config import require
from .data import DataConfig
from .finetune import FinetuneConfig
from .losses import DistillConfig
from .model import TrainModelConfig
from .optim import EmaConfig, OptimConfig
from .parallel import TrainRuntimeConfig
from .run_folder import RunConfig
from .schedule import ScheduleConfig


@dataclass(frozen=True)
class TrainConfig:
    """All settings of `train.py`."""

    model: TrainModelConfig
    data: DataConfig
    augment: AugmentConfig
    distill: DistillConfig
    finetune: FinetuneConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    ema: EmaConfig
    runtime: TrainRuntimeConfig
    run: RunConfig

    def __post_init__(self) -> None:
        require(
            not (self.model.pretrained and self.finetune.source),
            "--pretrained and --finetune both choose the weights: use one",
        )
