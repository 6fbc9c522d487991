"""What the report and the model card of a conversion say alike."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePath

from backbones.pretrained import Weights
from backbones.pretrained.card import Facts
from backbones.pretrained.load import Loaded

from ._export import Fitted, cfg_of
from .catalog import describe

_REMOTE = ("hf-hub:", "http://", "https://")


def facts_of(loaded: Loaded, fitted: Fitted, weights: Weights | None, license: str) -> Facts:
    """Collect what the model card states.

    Args:
        loaded: What was read.
        fitted: The model that it was fitted to.
        weights: The official weights that these are, or None.
        license: Their licence.
    """
    model, cfg = fitted.model, cfg_of(fitted.model)
    known = describe(cfg["architecture"])
    named = ((name, value.numel()) for name, value in model.named_parameters())
    # the auxiliary head is there in training only
    parameters = sum(count for name, count in named if not name.startswith("aux_head."))
    changes = {"Left out": fitted.left_out, "Made of others, or added": fitted.computed}
    return Facts(
        model=cfg["architecture"],
        family=fitted.family,
        paper=weights.paper if weights else known.paper,
        weights=weights,
        license=license,
        parameters=parameters,
        macs=known.macs if parameters == known.parameters else None,
        num_classes=fitted.model_args["num_classes"],
        input_size=tuple(cfg["input_size"]),
        crop_pct=cfg["crop_pct"],
        crop_mode=cfg["crop_mode"],
        interpolation=cfg["interpolation"],
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        # where somebody keeps his files is nobody else's business
        source=loaded.source if loaded.source.startswith(_REMOTE) else PurePath(loaded.source).name,
        source_sha256=loaded.sha256,
        copy=which_copy(loaded.ema, loaded.both),
        changes=tuple(f"{what}: `{summarize(names)}`" for what, names in changes.items() if names),
    )


def which_copy(ema: bool, both: bool) -> str:
    """Say which copy of the weights was taken.

    Args:
        ema: Whether it is the moving average.
        both: Whether the file has the other one too.
    """
    if not both:
        return f"the only weights there are{', a moving average' if ema else ''}"
    if ema:
        return "the moving average of the weights; the plain ones are there too"
    return "the plain weights; their moving average is there too"


def summarize(names: Iterable[str]) -> str:
    """List names of tensors, those that differ by a number once, with how many they are.

    Args:
        names: The names.
    """
    counts = Counter(re.sub(r"\d+(?=\.)", "*", name) for name in names)
    return ", ".join(f"{name} ({n})" if n > 1 else name for name, n in counts.items())
