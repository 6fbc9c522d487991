"""Multiply-adds of registered models, counted once in a run of the tests."""

from functools import cache

import timm

from backbones.ops import count_macs


@cache
def macs(name: str) -> int:
    """Multiply-adds of a model as `timm.create_model` makes it, at its own image size."""
    model = timm.create_model(name, device="meta")
    return count_macs(model, model.pretrained_cfg["input_size"])
