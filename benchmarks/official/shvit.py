"""SHViT as timm has it."""

from __future__ import annotations

from typing import Any

from timm.models import shvit
from torch import nn


def build(ours: nn.Module, name: str, **options: Any) -> nn.Module:
    """Create timm's model, whoever is registered under its name.

    Args:
        ours: Our model.
        name: Its name, which is timm's too.
        **options: As our model was created with.
    """
    return getattr(shvit, name)(**options)
