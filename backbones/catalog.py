"""What is known of the models and of their weights: all that `list`, `info` and the README show.

It comes from timm's registry, the table of weights (`backbones.pretrained`) and the counts beside
this file, so nothing here builds a model but `count`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import timm
import timm.models

from backbones.ops import count_macs
from backbones.pretrained import Weights, davit, maxvit, tic, weights_tables
from backbones.pretrained.families import all_weights
from backbones.pretrained.table import Paper

from ._costs import COSTS
from ._registry import list_models

# where an accuracy may have been reported, in the order of preference
_PLACES = {
    "paper": "in the paper",
    "timm": "by timm",
    "repository": "in the official repository",
    "log": "in a log of the official repository",
}
_LICENSES = {"apache-2.0": "Apache-2.0", "mit": "MIT", "none": "none stated"}
# why models that the table lacks have no weights
_NO_WEIGHTS = {
    "davit": ("the authors never released them", davit.PAPER),
    "maxvit": ("only a configuration of timm's exists", maxvit.TIMM_PAPER),
    "tic": ("this is a reconstruction, no official model exists", tic.PAPER),
}


@dataclass(frozen=True, kw_only=True)
class Images:
    """How images must be prepared for a model.

    Attributes:
        input_size: Channels, height and width.
        mean: Channel means, on a scale of 0 to 1.
        std: Channel standard deviations likewise.
        crop_pct: Side of the centre crop over side of the resized image.
        crop_mode: timm's name of how images are cropped.
        interpolation: How they are resized.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_pct: float
    crop_mode: str
    interpolation: str

    @classmethod
    def of(cls, source: Weights | timm.models.PretrainedCfg) -> Images:
        """Those of weights, or of a configuration of timm's."""
        return cls(
            input_size=tuple(source.input_size),
            mean=tuple(source.mean),
            std=tuple(source.std),
            crop_pct=source.crop_pct,
            crop_mode=source.crop_mode,
            interpolation=source.interpolation,
        )


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of this package.

    Attributes:
        name: As `timm.create_model` takes it.
        family: "shvit", ...
        description: One sentence.
        parameters: How many it has, with the classifier of its default weights.
        macs: Multiply-adds of one image of the default size.
        num_classes: Width of that classifier.
        images: How images are prepared by default.
        weights: Its official weights, the default first.
        no_weights: Why there are none; empty if there are.
        paper: The paper that describes it.
    """

    name: str
    family: str
    description: str
    parameters: int
    macs: int
    num_classes: int
    images: Images
    weights: tuple[Weights, ...]
    no_weights: str
    paper: Paper


def find_models(patterns: Sequence[str] = (), family: str = "") -> list[Model]:
    """Models by name.

    Args:
        patterns: Names of models with the wildcards of a shell; all models if there are none.
        family: Only this family; all if empty.

    Raises:
        ValueError: An unknown family, or a pattern that nothing matches.
    """
    names = list_models(family)
    _check_patterns(patterns, names)
    return [describe(name) for name in names if matches(name, patterns)]


def list_weights(patterns: Sequence[str] = (), family: str = "") -> list[Weights]:
    """Official weights by name, those included that exist only as files.

    Args:
        patterns: Names of models, or of weights (`model.tag`), with the wildcards of a shell; all
            weights if there are none.
        family: Only this family; all if empty.

    Raises:
        ValueError: An unknown family, or a pattern that nothing matches.
    """
    rows = [row for name in list_models(family) for row in weights_of(name)]
    _check_patterns(patterns, [name for row in rows for name in (row.model, row.name)])
    return [row for row in rows if matches(row.model, patterns) or matches(row.name, patterns)]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches any of the patterns; with no patterns every name does."""
    patterns = list(patterns)
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def find(name: str) -> tuple[Model, tuple[Weights, ...]]:
    """A model and its weights.

    Args:
        name: `model`, or `model.tag` for these weights only.

    Raises:
        ValueError: There are no such model or weights; the message names near ones.
    """
    models = list_models()
    model = name.partition(".")[0]
    if model not in models:
        raise ValueError(f"no model is called {model!r}: {_near(model, models)}")
    rows = weights_of(model)
    if name == model:
        return describe(model), rows
    chosen = tuple(row for row in rows if row.name == name)
    if not chosen:
        known = ", ".join(row.name for row in rows)
        hint = f"known are {known}" if known else f"{model} has none"
        raise ValueError(f"no weights are called {name!r}: {hint}")
    return describe(model), chosen


def describe(name: str) -> Model:
    """All that is known of a model.

    Args:
        name: Its name, without tag.
    """
    entry_point = timm.models.model_entrypoint(name)
    family = entry_point.__module__.rpartition(".")[2]
    cfg = timm.get_pretrained_cfg(name)
    rows = weights_of(name)
    no_weights, paper = ("", rows[0].paper) if rows else _NO_WEIGHTS[family]
    parameters, macs = COSTS[name]
    return Model(
        name=name,
        family=family,
        description=(entry_point.__doc__ or "").partition("\n")[0],
        parameters=parameters,
        macs=macs,
        num_classes=cfg.num_classes,
        images=Images.of(cfg),
        weights=rows,
        no_weights=no_weights,
        paper=paper,
    )


def weights_of(model: str) -> tuple[Weights, ...]:
    """The official weights of a model, the default first.

    Args:
        model: Its name, without tag.
    """
    return tuple(row for row in all_weights() if row.model == model)


def count(name: str) -> tuple[int, int]:
    """Count parameters and multiply-adds of a model, which is built without memory for it.

    Args:
        name: Its name, without tag.
    """
    model = timm.create_model(name, device="meta")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, count_macs(model, model.pretrained_cfg["input_size"])


def top1(weights: Weights) -> dict[str, str]:
    """Where accuracies were reported, in words -> percent, with as many digits as there.

    Args:
        weights: Which weights. The first accuracy is the one to show if there is room for one.
    """
    table = next(rows for rows in weights_tables().values() if weights in rows)
    found = {}
    for place, words in _PLACES.items():
        if place in weights.top1:
            digits = max(
                len(str(row.top1[place]).split(".")[1]) for row in table if place in row.top1
            )
            found[words] = f"{weights.top1[place]:.{digits}f}"
    return found


def link(weights: Weights) -> str:
    """The page of weights on the hub, or their file elsewhere; empty if all links are dead.

    Args:
        weights: Which weights.
    """
    if weights.hub_id is not None:
        return f"https://huggingface.co/{weights.hub_id}"
    return weights.urls[0] if weights.direct else ""


def license_name(identifier: str) -> str:
    """A licence as people write it.

    Args:
        identifier: SPDX identifier in lower case, or "none".
    """
    return _LICENSES[identifier]


def sentence(text: str) -> str:
    """A text with a capital at its start.

    Args:
        text: The text, not empty.
    """
    return text[0].upper() + text[1:]


def _check_patterns(patterns: Iterable[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"nothing matches {pattern!r}: {_near(pattern, names)}")


def _near(name: str, names: Sequence[str]) -> str:
    near = sorted(difflib.get_close_matches(name, set(names), n=4))
    if near:
        return f"did you mean {' or '.join(near)}?"
    return "python -m backbones list shows all names"
