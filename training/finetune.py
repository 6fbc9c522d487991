"""Trained weights to begin with, and the parts of the model that keep them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .config import option, require
from .errors import UsageError
from .model import UNUSABLE, checkpoint_meta, fit_input_size, load_into


@dataclass(frozen=True)
class FinetuneConfig:
    """What to begin with, and what to train."""

    source: str | None = option(
        None,
        "begin with the weights of a file, a run folder, a URL, or hf-hub:org/repo",
        flag="finetune",
    )
    freeze: tuple[str, ...] = option((), "parts that are not trained, such as stem,stages.0")
    freeze_bn: bool = option(False, "normalise batches by the stored statistics, and keep these")
    head_only: bool = option(False, "train the classifier only")

    def __post_init__(self) -> None:
        require(not (self.freeze and self.head_only), "--head-only freezes all: leave out --freeze")


def load_trained(model: Any, source: str, classes: tuple[str, ...] | None) -> str:
    """Load trained weights; the classifier stays fresh unless it was trained for `classes`.

    Where the source does not tell its classes, as many of them count as the same. A run folder
    also tells how the model is used to see images, which becomes its default.

    Args:
        model: What to fill.
        source: A weight file, a run or checkpoint folder, a URL, or `hf-hub:org/repo`.
        classes: The names of the classes of the data, none where it does not tell.

    Returns:
        One line that says what was loaded, and what was not.

    Raises:
        UsageError: The weights cannot be had or do not fit.
    """
    try:
        meta = checkpoint_meta(source)
        if meta:
            view = dict(meta["view"])
            size = view.pop("size")
            fit_input_size(model, size)
            model.pretrained_cfg |= view | {"input_size": (3, size, size)}
        known = meta.get("classes")
        other = bool(known and classes and known != list(classes))
        fresh = load_into(model, source, classifier=not other)
    except UNUSABLE as error:
        raise UsageError(str(error)) from error
    return f"weights from {source}" + (
        f"; freshly initialised: {', '.join(fresh)}" if fresh else ""
    )


def freeze(model: nn.Module, config: FinetuneConfig) -> None:
    """Exclude parts of `model` from training: their weights and statistics stay to the last bit.

    They are put into evaluation mode, which whoever evaluates the model must give back to them.

    Args:
        model: What to train, in training mode.
        config: Which parts.

    Raises:
        UsageError: There is no such part, or nothing is left to train.
    """
    for part in [model] if config.head_only else [_part(model, name) for name in config.freeze]:
        part.requires_grad_(False).eval()
    if config.head_only:
        for classifier in _classifiers(model):
            classifier.requires_grad_(True).train()
    if config.freeze_bn:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    require(
        any(p.requires_grad for p in model.parameters()),
        f"--freeze {','.join(config.freeze)} leaves nothing to train: freeze less",
    )


def _part(model: nn.Module, name: str) -> nn.Module:
    part = model
    for word in name.split("."):
        children = dict(part.named_children())
        if word not in children:
            raise UsageError(
                f"--freeze {name}: {type(part).__name__} has no part {word!r}; its parts are "
                f"{', '.join(children) or 'none'}"
            )
        part = children[word]
    return part


def _classifiers(model: Any) -> tuple[nn.Module, ...]:
    found = model.get_classifier()
    return found if isinstance(found, tuple) else (found,)
