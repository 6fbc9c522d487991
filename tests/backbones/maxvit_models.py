"""Narrow MaxViT models of every kind, ours and timm's, with the deterministic weights."""

from dataclasses import replace

import timm.models.maxxvit as theirs
import torch
from torch import nn

import backbones
from tests.backbones.models import deterministic

WIDTHS, DEPTHS, STEM = (32, 64, 64, 96), (1, 2, 1, 1), (16, 24)

# kind -> timm's configuration, our arguments
KINDS = {
    "tf": ("maxvit_tiny_tf", {"head_hidden_size": 48}),
    "rw": ("maxvit_pico_rw", {"style": "rw"}),
    "rmlp": ("maxvit_rmlp_pico_rw", {"style": "rmlp"}),
    "layer_scale": ("maxvit_rmlp_small_rw", {"style": "rmlp", "init_values": 1e-6}),
    "mlp_head": ("maxvit_rmlp_base_rw", {"style": "rmlp", "head_hidden_size": 48}),
    "parallel": ("maxvit_tiny_pm", {"style": "rw", "parallel": True}),
}


def ours(kind: str, depths=DEPTHS, **kwargs) -> nn.Module:
    """Our narrow model of a kind, with as many stages as depths."""
    args = {"img_size": 64, "num_classes": 10, **KINDS[kind][1], **kwargs}
    return backbones.MaxViT(WIDTHS[: len(depths)], depths, STEM, **args)


def timms(kind: str, depths=DEPTHS, **kwargs) -> nn.Module:
    """Timm's narrow model of a kind."""
    name, args = KINDS[kind]
    cfg = replace(
        theirs.model_cfgs[name],
        embed_dim=WIDTHS[: len(depths)],
        depths=depths,
        stem_width=STEM,
        head_hidden_size=args.get("head_hidden_size"),
    )
    return theirs.MaxxVit(cfg, **{"img_size": 64, "num_classes": 10, **kwargs})


def pair(kind: str, dtype: torch.dtype = torch.float64, **kwargs) -> tuple[nn.Module, nn.Module]:
    """Our model and timm's with the same weights."""
    return deterministic(ours(kind, **kwargs), dtype), deterministic(timms(kind, **kwargs), dtype)
