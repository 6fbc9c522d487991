"""The optimizer, gradient clipping, and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_class,
    get_optimizer_info,
    list_optimizers,
)
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .config import option, require
from .errors import UsageError


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and what happens to gradients."""

    name: str = option("adamw", "any optimizer of timm")
    lr: float = option(2e-3, "peak learning rate")
    lr_per: int | None = option(None, "the batch size that lr is meant for: scaled linearly")
    weight_decay: float = option(0.025, "on weights, not on biases and norms")
    betas: tuple[float, ...] | None = option(None, "Adam's; none: the optimizer's default")
    eps: float | None = option(None, "Adam's; none: the optimizer's default")
    momentum: float | None = option(None, "SGD's; none: the optimizer's default")
    layer_decay: float | None = option(
        None, "factor of the learning rate from a layer to the one below it; none: 1"
    )
    clip: float | None = option(1.0, "gradient clipping; none: off")
    clip_mode: str = option("norm", "what is clipped", choices=("norm", "value", "agc"))
    accumulate: int = option(1, "micro-batches per step")
    max_skips: int = option(20, "non-finite steps in a row before the run stops", may_change=True)

    def __post_init__(self) -> None:
        require(0 < self.lr < float("inf"), f"--lr must be positive and finite, not {self.lr}")
        require(
            self.lr_per is None or self.lr_per >= 1,
            f"--lr-per must be a batch size of 1 or more, not {self.lr_per}",
        )
        require(self.weight_decay >= 0, f"--weight-decay is negative: {self.weight_decay}")
        require(self.clip is None or self.clip > 0, f"--clip must be positive, not {self.clip}")
        require(
            self.layer_decay is None or 0 < self.layer_decay <= 1,
            f"--layer-decay must lie between 0 and 1, not {self.layer_decay}",
        )
        require(
            self.momentum is None or 0 <= self.momentum < 1,
            f"--momentum must lie between 0 and 1, not {self.momentum}",
        )
        require(self.accumulate >= 1, f"--accumulate must be at least 1, not {self.accumulate}")
        require(self.max_skips >= 1, f"--max-skips must be at least 1, not {self.max_skips}")

    def peak_lr(self, batch_size: int) -> float:
        """The learning rate at `batch_size` images per step."""
        return self.lr * batch_size / self.lr_per if self.lr_per else self.lr


@dataclass(frozen=True)
class EmaConfig:
    """The exponential moving average of the weights."""

    decay: float = option(0.0, "decay per step, 0 for no average", flag="ema_decay")
    warmup: bool = option(True, "follow faster in the beginning", flag="ema_warmup")

    def __post_init__(self) -> None:
        require(0 <= self.decay < 1, f"--ema-decay must lie between 0 and 1, not {self.decay}")


def make_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over `model`; what `model.no_weight_decay()` names is not decayed.

    Raises:
        UsageError: timm knows no such optimizer, or it does not take the settings.
    """
    if config.name not in list_optimizers():
        raise UsageError(f"unknown optimizer {config.name}: one of {', '.join(list_optimizers())}")
    info = get_optimizer_info(config.name)
    given: dict[str, Any] = {"layer_decay": config.layer_decay}
    for name in ("betas", "eps", "momentum"):
        given[name] = getattr(config, name)
        # timm drops it without a word
        swallowed = given[name] is not None and not getattr(info, f"has_{name}")
        require(not swallowed, f"{config.name} takes no {name}: leave out --{name}")
    kind: Any = get_optimizer_class(config.name, bind_defaults=False)
    # one pass over the weights where PyTorch has it (sharded ones: Adam's only), not a loop
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    fused = (torch.optim.Adam,) if sharded else (torch.optim.Adam, torch.optim.SGD)
    given["fused"] = issubclass(kind, fused) or None
    try:
        return create_optimizer_v2(
            model,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            **{name: value for name, value in given.items() if value is not None},
        )
    except (TypeError, ValueError, IndexError) as error:
        raise UsageError(f"{config.name} does not take these settings: {error}") from None


def make_ema(config: EmaConfig, model: nn.Module) -> ModelEmaV3 | None:
    """The moving average, none when it is off."""
    if config.decay == 0:
        return None
    return ModelEmaV3(model, decay=config.decay, use_warmup=config.warmup)


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a scalar on their device."""
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(config: OptimConfig, parameters: Sequence[Tensor], norm: Tensor) -> None:
    """Clip in place.

    Args:
        config: The limit and its meaning.
        parameters: All of the model's, the classifier's too (agc).
        norm: Their `gradient_norm`.
    """
    if config.clip is None:
        return
    if config.clip_mode == "norm":
        clip_grads_with_norm_(parameters, config.clip, norm)
    else:
        dispatch_clip_grad(parameters, config.clip, mode=config.clip_mode)
