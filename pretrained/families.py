"""The families with official weights: their tables, and which one a model belongs to."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import PurePath
from typing import Protocol

from torch import Tensor, nn

from . import biformer, davit, l2vit, maxvit, overlock, ravlt, shvit, tic
from .errors import WeightsError
from .table import Weights


class Family(Protocol):
    """What every module of this package that is named after a family has."""

    WEIGHTS: tuple[Weights, ...]

    def to_ours(self, state_dict: Mapping[str, Tensor], /) -> dict[str, Tensor]:
        """Rename the tensors of any official state dict to our names."""
        ...

    def to_official(self, state_dict: Mapping[str, Tensor], /) -> dict[str, Tensor]:
        """Rename the tensors of one of our state dicts to the official names."""
        ...


FAMILIES: dict[str, Family] = {
    "biformer": biformer,
    "davit": davit,
    "l2vit": l2vit,
    "maxvit": maxvit,
    "overlock": overlock,
    "ravlt": ravlt,
    "shvit": shvit,
    "tic": tic,
}

# modules of timm that are not named as the family
_TIMM_MODULES = {"maxxvit": "maxvit"}


def weights_tables() -> dict[str, tuple[Weights, ...]]:
    """Every family -> its official weights."""
    return {name: family.WEIGHTS for name, family in FAMILIES.items()}


def all_weights() -> list[Weights]:
    """The official weights of all families."""
    return [row for table in weights_tables().values() for row in table]


def find_weights(name: str) -> Weights:
    """Look up official weights.

    Args:
        name: `model.tag`, or a model's name alone for the first of its tags.

    Raises:
        WeightsError: No such weights.
    """
    rows = all_weights()
    for row in rows:
        if name in (row.name, row.model):
            return row
    close = difflib.get_close_matches(name, [row.name for row in rows])
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(FAMILIES)}"
    raise WeightsError(f"no official weights are called {name!r}; {hint}")


def prefers_ema(location: str) -> bool:
    """Whether a location is that of an official file of which the moving average is meant.

    Args:
        location: A path or a URL, whose last part is the name of the file.
    """
    names = {PurePath(url).name for row in all_weights() if row.prefer_ema for url in row.urls}
    return PurePath(location).name in names


def family_of(model: nn.Module) -> Family:
    """The family that a model belongs to, by the module its class is defined in.

    Args:
        model: A model of this project or timm's model of the same family, or of a subclass.

    Raises:
        WeightsError: The class belongs to no known family.
    """
    for cls in type(model).__mro__:
        module = cls.__module__.rpartition(".")[2]
        family = FAMILIES.get(_TIMM_MODULES.get(module, module))
        if family is not None:
            return family
    raise WeightsError(
        f"{type(model).__module__}.{type(model).__name__} is of no family with official weights "
        f"({', '.join(FAMILIES)}); pass the bare model, not a wrapper around it"
    )
