"""Whole models as one gets them elsewhere, for comparison.

timm's implementation where it has one (MaxViT, DaViT, SHViT), otherwise a plain PyTorch
re-statement of the official algorithm. They serve as peers only: nothing else may import them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import timm
from torch import nn

import backbones  # noqa: F401 - registers our models

TIMM = ("maxvit", "davit", "shvit")


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Create our model and its peer, with the same weights, for inference.

    Args:
        name: Of our model.
        **options: Of `timm.create_model`, for both: `device="meta"` for no weights.
    """
    ours = timm.create_model(name, **options).eval()
    module = import_module(f"{__name__}.{family(ours)}")
    peer = module.build(ours, name, **options).eval()
    peer.load_state_dict(ours.state_dict(), assign=options.get("device") == "meta")
    return ours, peer


def family(ours: nn.Module) -> str:
    """The family of our model, as its module is called."""
    return type(ours).__module__.rpartition(".")[2]


def kind(ours: nn.Module) -> str:
    """What the peer of our model is: `timm` or `official`."""
    return "timm" if family(ours) in TIMM else "official"
