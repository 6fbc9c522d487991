"""Timm's MaxViT, by its own function: its name in the registry is ours."""

from __future__ import annotations

from typing import Any

import timm.models.maxxvit
from torch import nn


def build(ours: nn.Module, name: str, **options: Any) -> nn.Module:
    """Create timm's model, whose tensors have the names and shapes of ours.

    Args:
        ours: Our model.
        name: Its name.
        **options: What it was created with.

    Raises:
        ValueError: Timm has no model of that name.
    """
    create = getattr(timm.models.maxxvit, name.partition(".")[0], None)
    if create is None:
        raise ValueError(f"timm has no {name!r}: take a MaxViT of `backbones.list_models()`")
    return create(**options)
