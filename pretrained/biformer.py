"""BiFormer: official weights and their tensor names.

Source: Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", CVPR 2023,
arXiv:2303.08810; https://github.com/rayleizhu/BiFormer. Its links to the weights are dead. Files
that people still have are called `biformer_small_best.pth` and alike; they are whole training
checkpoints, of which the official code takes `model`, not `model_ema`.

The releases have three sets of names: that of the main models, that of `stl` (Swin-T's layout), and
that of `stl_nchw`, where all linear layers are 1x1 convolutions. Ours are told apart by what they
hold: only the main models have `stem.conv1`, and only `stl_nchw` has weights of four dimensions in
its linear layers, which keep the official shapes. So no file fits a model of another kind.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .table import Paper, Weights

PAPER = Paper(
    title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
    authors=("Lei Zhu", "Xinjiang Wang", "Zhanghan Ke", "Wayne Zhang", "Rynson Lau"),
    venue="CVPR",
    year=2023,
    arxiv="2303.08810",
    code="https://github.com/rayleizhu/BiFormer",
    code_license="mit",
)

_BN_EPS = 1e-5
_DEAD = "https://github.com/rayleizhu/BiFormer/issues/53"
_NOTE = (
    f"The authors' links are dead ({_DEAD}); their folder "
    "https://1drv.ms/u/s!AkBbczdRlZvChGsXFqAA-PVnA-R8?e=IPlOCG may still open in a browser: give "
    "the file that you got there or elsewhere, to timm.create_model as "
    'pretrained_cfg_overlay=dict(file="path/to/it.pth")'
)


def _weights(model: str, share: str, file: str = "best", **top1: float) -> Weights:
    return Weights(
        name=f"{model}.in1k",
        hub_id=None,
        # the name in the authors' folder, or in the cache of their code
        filename=f"{model}_{file}.pth",
        urls=(f"https://api.onedrive.com/v1.0/shares/s!{share}/root/content",),
        dead_links=_DEAD,
        wrapping="under `model`, in a whole training checkpoint with `model_ema` beside it",
        license="mit",
        top1=top1,
        paper=PAPER,
        note=_NOTE,
    )


WEIGHTS: tuple[Weights, ...] = (
    _weights("biformer_tiny", "AkBbczdRlZvChHEOoGkgwgQzEDlM", paper=81.4),
    _weights("biformer_small", "AkBbczdRlZvChHDyM-x9KWRBZ832", paper=83.8, log=83.754),
    _weights("biformer_base", "AkBbczdRlZvChHI_XPhoadjaNxtO", paper=84.3),
    _weights("biformer_stl", "AkBbczdRlZvChSf-m7ujkvx9lIQ1", paper=82.7),
    _weights("biformer_stl_nchw", "AkBbczdRlZvChWYrKbWbMgqd2Ai0", "in1k", repository=82.7),
)

_OURS = {
    "pos_embed": "cpe.proj",
    "attn.qkv.qkv": "attn.qkv",
    "attn.qkv_linear": "attn.qkv",
    "attn.wo": "attn.proj",
    "attn.output_linear": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
    "mlp.3": "mlp.fc2",
}
_THEIRS = {
    "main": {"cpe.proj": "pos_embed", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"},
    "stl": {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"},
    "stl_nchw": {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"},
}
# of blocks with routing: those with attention over all tokens have our names
_THEIR_ATTENTION = {
    "main": {"attn.qkv": "attn.qkv.qkv", "attn.proj": "attn.wo"},
    "stl": {"attn.qkv": "attn.qkv.qkv", "attn.proj": "attn.wo"},
    "stl_nchw": {"attn.qkv": "attn.qkv_linear", "attn.proj": "attn.output_linear"},
}

# layers of the stem and of a downsampling, by their place in it
_CONV_FIRST, _NORM_FIRST = {"0": "conv", "1": "bn"}, {"0": "bn", "1": "conv"}
_STEM = {
    "main": {"0": "conv1.conv", "1": "conv1.bn", "3": "conv2.conv", "4": "conv2.bn"},
    "stl": _CONV_FIRST,
    "stl_nchw": _CONV_FIRST,
}
_DOWN = {"main": _CONV_FIRST, "stl": _NORM_FIRST, "stl_nchw": _NORM_FIRST}

_FEATURE_NORM = re.compile(r"extra_norms\.(\d+\.(?:weight|bias))")
_OUR_FEATURE_NORM = re.compile(r"feature_norms\.(\d+\.(?:weight|bias))")
_MAIN_BLOCK = re.compile(r"stages\.\d+\.\d+\..+")
_BLOCK = re.compile(r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.(.+)\.(weight|bias)")
_LAYER = re.compile(r"downsample_layers\.(\d+)\.(\d+)\.(\w+)")
_OUR_BLOCK = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)\.(weight|bias)")
_OUR_LAYER = re.compile(r"(?:stem|stages\.(\d+)\.downsample)\.(.+)\.(\w+)")
_HEAD = re.compile(r"head\.(weight|bias)")
_OUR_HEAD = re.compile(r"head\.fc\.(weight|bias)")


def to_ours(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an official state dict to this project's names.

    Names that are ours already, and names of neither code, stay as they are. The official backbones
    of detectors norm every map that they hand out (`extra_norms`) and lack the norm of the
    classifier: one that does nothing stands in for it. A model takes of both what it has.

    Args:
        state_dict: Name -> tensor, unwrapped.
    """
    if not any(name.startswith("downsample_layers.") for name in state_dict):
        return dict(state_dict)
    kind = "main" if any(_MAIN_BLOCK.fullmatch(name) for name in state_dict) else "stl"
    ours = {_our_name(name, kind): value for name, value in state_dict.items()}
    return _add_norm(ours) if any(_FEATURE_NORM.fullmatch(name) for name in state_dict) else ours


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of one of our state dicts to the official names.

    Args:
        state_dict: Name -> tensor, unwrapped.
    """
    kind = _kind(state_dict)
    # only attention over all tokens has no bias
    routed = {n.removesuffix("attn.qkv.bias") for n in state_dict if n.endswith("attn.qkv.bias")}
    return {_official_name(name, kind, routed): value for name, value in state_dict.items()}


def _our_name(name: str, kind: str) -> str:
    if match := _BLOCK.fullmatch(name):
        stage, block, part, leaf = match.groups()
        return f"stages.{stage}.blocks.{block}.{_OURS.get(part, part)}.{leaf}"
    if match := _LAYER.fullmatch(name):
        stage, index, leaf = match.groups()
        if stage == "0":
            return f"stem.{_STEM[kind].get(index, index)}.{leaf}"
        return f"stages.{stage}.downsample.{_DOWN[kind].get(index, index)}.{leaf}"
    if match := _FEATURE_NORM.fullmatch(name):
        return f"feature_norms.{match[1]}"
    return f"head.fc.{match[1]}" if (match := _HEAD.fullmatch(name)) else name


def _official_name(name: str, kind: str, routed: Collection[str]) -> str:
    if match := _OUR_BLOCK.fullmatch(name):
        stage, block, part, leaf = match.groups()
        parts = _THEIRS[kind]
        if f"stages.{stage}.blocks.{block}." in routed:
            parts = parts | _THEIR_ATTENTION[kind]
        blocks = "" if kind == "main" else "blocks."
        return f"stages.{stage}.{blocks}{block}.{parts.get(part, part)}.{leaf}"
    if match := _OUR_LAYER.fullmatch(name):
        stage, layer, leaf = match.groups()
        layers = _DOWN[kind] if stage else _STEM[kind]
        indices = {ours: index for index, ours in layers.items()}
        return f"downsample_layers.{stage or 0}.{indices.get(layer, layer)}.{leaf}"
    if match := _OUR_FEATURE_NORM.fullmatch(name):
        return f"extra_norms.{match[1]}"
    return f"head.{match[1]}" if (match := _OUR_HEAD.fullmatch(name)) else name


def _kind(state_dict: Mapping[str, Tensor]) -> str:
    """Which of the three sets of official names one of our state dicts has."""
    if "stem.conv1.conv.weight" in state_dict:
        return "main"
    weight = next((v for n, v in state_dict.items() if n.endswith(".attn.proj.weight")), None)
    return "stl_nchw" if weight is not None and weight.ndim == 4 else "stl"


def _add_norm(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add a norm of the last stage that changes nothing, as wide as that stage."""
    widest = [v for n, v in state_dict.items() if n.endswith(".downsample.conv.bias")]
    if not widest or "norm.weight" in state_dict:
        return state_dict
    like = max(widest, key=len)
    norm = {
        "norm.weight": torch.full_like(like, (1 + _BN_EPS) ** 0.5),
        "norm.bias": torch.zeros_like(like),
        "norm.running_mean": torch.zeros_like(like),
        "norm.running_var": torch.ones_like(like),
        "norm.num_batches_tracked": torch.tensor(0),
    }
    return {**state_dict, **norm}
