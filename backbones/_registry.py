"""Registration on timm's registry: our models under timm's names, and the way back.

Where timm ships a model of the same name ours takes its place, with all of timm's pretrained tags.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import timm
import timm.models
from torch import nn

from backbones.pretrained import WeightsError
from backbones.pretrained.errors import reason

from ._hub_config import HUB, LOCAL, read_config

_logger = logging.getLogger("backbones")

_families: dict[str, str] = {}
_replaced: dict[str, Callable[..., nn.Module]] = {}

# what constructors raise for arguments of the wrong kind or length
_UNBUILDABLE = (TypeError, ValueError, LookupError, ArithmeticError, AssertionError, RuntimeError)

EntryPoint = TypeVar("EntryPoint", bound=Callable[..., nn.Module])


def _keep_timm() -> bool:
    return os.environ.get("BACKBONES_KEEP_TIMM", "0") not in ("", "0")


def _is_ours(entry_point: Callable[..., Any]) -> bool:
    return entry_point.__module__.split(".")[0] == __name__.split(".")[0]


def _register(entry_point: Callable[..., nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Overwriting .* in registry")
        timm.models.register_model(entry_point)


def _adopt_tags(name: str, cfgs: dict[str, Any]) -> None:
    """Put timm's pretrained tags of `name`, in timm's order, before our additional ones."""
    theirs = {
        full.partition(".")[2]: cfg
        for full, cfg in timm.models.get_arch_pretrained_cfgs(name).items()
    }
    if name in cfgs:
        ours = cfgs[name]
        theirs |= {tag: ours.cfgs[tag] for tag in ours.tags if tag not in theirs}
    # an asterisk marks the default tag
    keys = [f"{name}.{tag}" if tag else name for tag in theirs]
    keys[0] += "*" if "." in keys[0] else ""
    cfgs |= timm.models.generate_default_cfgs(dict(zip(keys, theirs.values(), strict=True)))


def register_model(entry_point: EntryPoint) -> EntryPoint:
    """Register a model with timm under the name of its entry point; use as a decorator.

    An entry of timm's own is replaced, unless the environment variable `BACKBONES_KEEP_TIMM` is set
    to 1. The module of the entry point must define `default_cfgs` first.

    Args:
        entry_point: A function `(pretrained=False, **kwargs)` that returns the model.

    Returns:
        The function, unchanged.
    """
    name = entry_point.__name__
    if timm.is_model(name) and not _is_ours(timm.models.model_entrypoint(name)):
        if _keep_timm():
            return entry_point
        _replaced[name] = timm.models.model_entrypoint(name)
        _adopt_tags(name, sys.modules[entry_point.__module__].default_cfgs)
    _register(entry_point)
    _families[name] = entry_point.__module__.rpartition(".")[2]
    return entry_point


def log_replaced() -> None:
    """Say in one INFO line which of timm's entries were replaced."""
    if _replaced:
        _logger.info(
            "backbones replaced timm's %s; backbones.restore_timm_models() undoes it",
            ", ".join(sorted(_replaced)),
        )


def restore_timm_models() -> list[str]:
    """Give timm's own implementations their names back, for the rest of the process.

    Returns:
        The names, sorted. Models that timm does not have stay registered.
    """
    names = sorted(_replaced)
    for name in names:
        _register(_replaced.pop(name))
        del _families[name]
    return names


def list_models(family: str = "", pretrained: bool = False) -> list[str]:
    """Names of the models of this package, for `timm.create_model`.

    Args:
        family: Only this family ("shvit", ...); all if empty.
        pretrained: Names with tag, `model.tag`, and only those with weights.

    Returns:
        Sorted names.

    Raises:
        ValueError: An unknown family.
    """
    families = sorted(set(_families.values()))
    if family and family not in families:
        raise ValueError(f"family {family!r} is unknown: choose from {', '.join(families)}")
    names = [name for name, its in sorted(_families.items()) if family in ("", its)]
    if not pretrained:
        return names
    tags = (timm.list_models(name, pretrained=True, include_tags=True) for name in names)
    return [tag for found in tags for tag in found]


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a model by name: `timm.create_model`, with an error that suggests what was meant.

    The configuration of a model on the hub or in a folder is read as carefully as its weights: its
    arguments must be among those that we know, in their ranges.

    Args:
        name: Any name that timm takes: `model`, `model.tag`, `hf-hub:...`, `local-dir:...`.
        pretrained: Load weights.
        **kwargs: Passed on to `timm.create_model`; they win over the configuration's.

    Returns:
        The model.

    Raises:
        ValueError: An unknown model or tag; the message names near ones.
        WeightsError: A configuration or weights that cannot be found, fetched, trusted or used.
    """
    if name.startswith((HUB, LOCAL)):
        return _create_configured(name, pretrained, kwargs)
    _check_name(name)
    return timm.create_model(name, pretrained=pretrained, **kwargs)


def _create_configured(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    config = read_config(name, _families, kwargs, kwargs.get("cache_dir"))
    if config is None:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    try:
        return timm.create_model(
            config.architecture,
            pretrained=pretrained,
            pretrained_cfg=config.pretrained_cfg,
            **{**config.model_args, **kwargs},
        )
    except _UNBUILDABLE as error:
        if isinstance(error, WeightsError) or not config.model_args:
            raise
        raise WeightsError(
            f"cannot use {config.source}: no {config.architecture} can be built with its "
            f"model_args ({', '.join(config.model_args)}): {reason(error)}; ask its author to mend "
            "it, or pass other values"
        ) from error


def _check_name(name: str) -> None:
    model, _, tag = name.partition(".")
    if not timm.is_model(model):
        near = sorted(difflib.get_close_matches(model, timm.list_models(), n=4))
        meant = f"did you mean {' or '.join(near)}?" if near else "see list_models()"
        raise ValueError(f"model {model!r} is unknown: {meant}")
    tags = [full.partition(".")[2] for full in timm.models.get_arch_pretrained_cfgs(model)]
    if tag and tag not in tags:
        known = ", ".join(filter(None, tags)) or "it has none, leave it out"
        raise ValueError(f"pretrained tag {tag!r} of {model} is unknown: {known}")
