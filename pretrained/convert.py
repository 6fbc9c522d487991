"""Fitting official weights to a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import WeightsError
from .families import family_of
from .unwrap import unwrap


def convert_state_dict(
    state_dict: Mapping[str, Any], model: nn.Module, *, require_head: bool = True
) -> dict[str, Tensor]:
    """Rename official weights to the names of `model`, and check that they fit it.

    Args:
        state_dict: Weights of the model's family under official, timm's or our names; bare, or
            wrapped as training scripts do (see `unwrap`).
        model: What the weights are for. It is not changed. Its `rename_weights`, if it has one,
            stands for the `to_ours` of its family; its `adapt_weights` brings weights under our
            names to its form.
        require_head: Whether the classifier must be there and fit. Without it, as the filter of
            timm's loader, a missing classifier, another number of classes and another number of
            input channels pass: timm adapts them next.

    Returns:
        Name -> tensor for every tensor of `model`, in the order of `model.state_dict()`.

    Raises:
        WeightsError: Tensors are missing, left over or of the wrong shape; the message names them.
    """
    target = {name: value.shape for name, value in model.state_dict().items()}
    to_ours = getattr(model, "rename_weights", None) or family_of(model).to_ours
    given = to_ours(unwrap(state_dict))
    adapt = getattr(model, "adapt_weights", None)
    if adapt is not None:
        given = adapt(given)
    classifiers, first_convs = _cfg_names(model, "classifier"), _cfg_names(model, "first_conv")
    heads = tuple(f"{name.split('.')[0]}." for name in classifiers)
    if not any(f"{name}.weight" in target for name in classifiers):
        # the model has no classifier, so that of the weights is of no use
        given = {k: v for k, v in given.items() if k in target or not k.startswith(heads)}

    optional = () if require_head else heads
    _check_names(target, given, heads, optional)
    _check_shapes(target, given, {} if require_head else _adaptable(classifiers, first_convs))
    return {name: given[name] for name in target if name in given}


def _cfg_names(model: nn.Module, key: str) -> tuple[str, ...]:
    """Module names that the model's timm configuration gives under `key`."""
    value = (getattr(model, "pretrained_cfg", None) or {}).get(key) or ()
    return (value,) if isinstance(value, str) else tuple(value)


def _adaptable(classifiers: tuple[str, ...], first_convs: tuple[str, ...]) -> dict[str, int]:
    """Tensors that timm adapts to the model -> the dimension in which they may differ."""
    dims = {f"{name}.{kind}": 0 for name in classifiers for kind in ("weight", "bias")}
    return dims | {f"{name}.weight": 1 for name in first_convs}


def _check_names(
    target: Collection[str],
    given: Collection[str],
    heads: tuple[str, ...],
    optional: tuple[str, ...],
) -> None:
    missing = [name for name in target if name not in given and not name.startswith(optional)]
    left_over = [name for name in given if name not in target]
    found = [f"missing {_list(missing)}"] if missing else []
    found += [f"left over {_list(left_over)}"] if left_over else []
    if not found:
        return
    norms_given, norms_target = _count_norms(given, target), _count_norms(target, given)
    # weights of another family have other parts, and say nothing about norms
    related = {n.split(".")[0] for n in target} >= {n.split(".")[0] for n in given}
    if related and norms_given and not norms_target:
        fix = "the model's norms are folded away: load the weights before fuse()"
    elif related and norms_target and not norms_given:
        fix = "the weights are of a fused model: fuse() the model first"
    elif all(name.startswith(heads) for name in (*missing, *left_over)):
        fix = "they have no classifier: use num_classes=0 or require_head=False"
    else:
        fix = "check that they are of this model and size"
    raise WeightsError(f"the weights do not fit the model: {'; '.join(found)}; {fix}")


def _count_norms(names: Collection[str], others: Collection[str]) -> int:
    """How many norms there are of the kind that `fuse()` folds away, of two sets of names."""
    batch = any(name.endswith(".running_mean") for name in (*names, *others))
    return sum(name.endswith(".running_mean" if batch else ".norm1.weight") for name in names)


def _check_shapes(
    target: Mapping[str, torch.Size], given: Mapping[str, Tensor], adaptable: Mapping[str, int]
) -> None:
    wrong = [
        f"{name} is {tuple(value.shape)} but {tuple(target[name])} in the model"
        for name, value in given.items()
        if not _fits(value.shape, target[name], adaptable.get(name))
    ]
    if wrong:
        raise WeightsError(
            f"the weights do not fit the model: {_list(wrong)}; create the model with the size, "
            "num_classes and in_chans of the weights"
        )


def _fits(given: torch.Size, target: torch.Size, free_dim: int | None) -> bool:
    """Whether two shapes are equal, apart from the dimension `free_dim`."""
    return len(given) == len(target) and all(
        a == b or dim == free_dim for dim, (a, b) in enumerate(zip(given, target, strict=True))
    )


def _list(items: list[str], limit: int = 3) -> str:
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest
