"""The model to train or to evaluate, with its first weights."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import backbones
from backbones.pretrained import WeightsError, load_weights

from . import checkpoint
from .config import option, require
from .errors import UsageError

# what timm, the hub's client and backbones.pretrained raise for names and weights
UNUSABLE = (ValueError, TypeError, RuntimeError, OSError)


@dataclass(frozen=True)
class ModelConfig:
    """Which model."""

    name: str = option("shvit_s1", "any model of backbones or timm")
    pretrained: bool = option(False, "take the official weights")
    num_classes: int | None = option(None, "width of the classifier; none: what the data has")


@dataclass(frozen=True)
class TrainModelConfig(ModelConfig):
    """The model and how it trains."""

    drop_path: float | None = option(None, "stochastic depth rate; none: the model's default")
    grad_checkpointing: bool = option(False, "less memory for more time", may_change=True)
    aux_weight: float = option(
        0.0, "weight of the loss of an auxiliary classifier; 0: none (OverLoCK's recipe: 0.4)"
    )

    def __post_init__(self) -> None:
        require(
            self.drop_path is None or 0 <= self.drop_path < 1,
            f"--drop-path must be at least 0 and below 1, not {self.drop_path}",
        )
        require(self.aux_weight >= 0, f"--aux-weight {self.aux_weight} must not be negative")


def build_model(
    config: TrainModelConfig, num_classes: int, *, distilled: bool = False
) -> nn.Module:
    """Build the model to train.

    Args:
        config: Which one.
        num_classes: Width of the classifier.
        distilled: A teacher is there: with a second classifier for what it says, if the model can
            have one.

    Raises:
        UsageError: An unknown name, or weights that cannot be had.
    """
    second = distilled and config.name.startswith("shvit")
    require(
        not (config.pretrained and (config.aux_weight or second)),
        f"--pretrained has no second classifier: use --finetune {config.name} in its place",
    )
    try:
        model: Any = create(
            config.name,
            pretrained=config.pretrained,
            num_classes=num_classes,
            drop_path_rate=config.drop_path,
            aux_head=True if config.aux_weight else None,
            distilled=True if second else None,
        )
        if config.grad_checkpointing:
            model.set_grad_checkpointing()
    except UNUSABLE as error:
        if isinstance(error, TypeError) and "aux_head" in str(error):
            raise UsageError(f"--aux-weight: {config.name} has no auxiliary classifier") from error
        raise UsageError(str(error)) from error
    if distilled and hasattr(model, "set_distilled_training"):
        model.set_distilled_training()
    return model


def create(name: str, **arguments: Any) -> nn.Module:
    """`backbones.create_model` without the arguments that are none."""
    return backbones.create_model(name, **{k: v for k, v in arguments.items() if v is not None})


def fit_input_size(model: Any, img_size: int) -> None:
    """Tell models that must know it the input side in pixels.

    Raises:
        UsageError: The model cannot take this size.
    """
    try:
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size=(img_size, img_size))
        if not type(model).__module__.startswith("backbones."):
            # others than ours may find out only when they see an image
            with torch.inference_mode():
                model.eval()(torch.zeros(1, 3, img_size, img_size))
            model.train()
    except (ValueError, AssertionError, RuntimeError) as error:
        raise UsageError(f"--img-size {img_size}: {error}") from error


def load_into(
    model: nn.Module, location: str, *, ema: bool = False, classifier: bool = True
) -> list[str]:
    """Load weights into `model`; a classifier of another width keeps its fresh values.

    Args:
        model: What to fill.
        location: A weight file, a run or checkpoint folder, a URL, or `hf-hub:org/repo`.
        ema: Take the moving average where there is one.
        classifier: Load the classifier too, if it fits.

    Returns:
        The tensors that were not loaded: those of the classifier, or none.

    Raises:
        WeightsError: The weights cannot be found, read or fitted to the model.
    """
    given = _read(location, ema)
    family = sys.modules[type(model).__module__]
    if family.__name__.startswith("backbones."):
        try:
            # official names are ours too, and tables of positions fit other sizes of images
            given = family.checkpoint_filter_fn(given, model)
        except (WeightsError, ValueError) as error:
            raise WeightsError(f"{location}: {error}") from error
    target = model.state_dict()
    layers = _classifier_names(model)
    unwanted = () if classifier else tuple(f"{layer}." for layer in layers)
    fitting = {
        name: value
        for name, value in given.items()
        if name in target and value.shape == target[name].shape and not name.startswith(unwanted)
    }
    fresh = [name for name in target if name not in fitting]
    heads = tuple(f"{layer.split('.')[0]}." for layer in layers)
    wrong = [name for name in (*fresh, *(given.keys() - target)) if not name.startswith(heads)]
    if wrong:
        raise WeightsError(
            f"{location} does not fit the model: {', '.join(wrong[:3])} and so on "
            f"({len(wrong)} tensors); check --model"
        )
    model.load_state_dict(fitting, strict=False)
    return fresh


def checkpoint_folder(location: str) -> Path | None:
    """The checkpoint that a run folder, a checkpoint folder or a file in it stands for."""
    path = Path(location)
    path = path.parent if path.is_file() else path
    return path if (path / checkpoint.META).is_file() else checkpoint.latest(path / "ckpt")


def checkpoint_meta(location: str | None) -> dict[str, Any]:
    """What a checkpoint of ours says of itself; nothing of any other weights.

    Args:
        location: A run folder, a checkpoint folder, or a file in it.
    """
    folder = checkpoint_folder(location) if location else None
    return checkpoint.read_meta(folder) if folder else {}


def count_parameters(model: nn.Module) -> int:
    """The number of values that are learnt, whether or not they are frozen now."""
    return sum(p.numel() for p in model.parameters())


def to_device(model: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """Move `model`, in place."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(device).to(memory_format=layout)


def _read(location: str, ema: bool) -> dict[str, Tensor]:
    folder = checkpoint_folder(location)
    if folder is None or Path(location).is_file():
        return load_weights(location, ema=ema)
    path = folder / (checkpoint.EMA if ema else checkpoint.MODEL)
    if ema and not path.is_file():
        raise WeightsError(f"{location} has no moving average: leave out --ema")
    return load_weights(path)


def _classifier_names(model: nn.Module) -> tuple[str, ...]:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else names
    return tuple(names)
