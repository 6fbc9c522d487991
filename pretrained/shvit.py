"""SHViT: official weights and their tensor names.

Source: Yun and Ro, "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design",
CVPR 2024, arXiv:2401.16456; https://github.com/ysj9909/SHViT. The release also has two detectors
(`retinanet_shvit_s4_1x_coco.pth`, `maskrcnn_shvit_s4_1x_coco.pth`), of which `load_weights` keeps
the backbone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .table import Paper, Weights

PAPER = Paper(
    title="SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design",
    authors=("Seokju Yun", "Youngmin Ro"),
    venue="CVPR",
    year=2024,
    arxiv="2401.16456",
    code="https://github.com/ysj9909/SHViT",
    code_license="mit",
)

_BN_EPS = 1e-5
_HEAD = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "l.weight", "l.bias")
_RELEASE = "https://github.com/ysj9909/SHViT/releases/download/v1.0"


def _weights(model: str, paper: float, timm: float, size: int = 224) -> Weights:
    return Weights(
        name=f"{model}.in1k",
        hub_id=f"timm/{model}.in1k",
        urls=(f"{_RELEASE}/{model}.pth",),
        wrapping="bare",
        converted_from=f"{_RELEASE}/{model}.pth",
        input_size=(3, size, size),
        license="mit",
        top1={"paper": paper, "timm": timm},
        paper=PAPER,
        note="Trained without distillation; the plain weights are published, not the EMA copy.",
    )


WEIGHTS: tuple[Weights, ...] = (
    _weights("shvit_s1", paper=72.8, timm=72.780),
    _weights("shvit_s2", paper=75.2, timm=75.184),
    _weights("shvit_s3", paper=77.4, timm=77.356),
    _weights("shvit_s4", paper=79.4, timm=79.362, size=256),
)

# where the official code keeps the five parts of a downsampling layer: in the stage's first three
# entries, before its blocks
_DOWNSAMPLE = ("0.0", "0.1", "1", "2.0", "2.1")
_FIRST_BLOCK = 3

_OFFICIAL_DOWNSAMPLE = re.compile(r"blocks([23])\.(0\.0|0\.1|1|2\.0|2\.1)\.(.+)")
_OFFICIAL_BLOCK = re.compile(r"blocks([123])\.(\d+)\.(.+)")
_OUR_PART = re.compile(r"stages\.(\d+)\.(downsample|blocks)\.(\d+)\.(.+)")


def to_ours(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an official state dict to this project's names, which are timm's.

    Names that are ours already, and names of neither code, stay as they are. A distillation
    head (`head_dist`) is merged into `head`: the model averages the two outputs.

    Args:
        state_dict: Name -> tensor, unwrapped.
    """
    ours = rename(state_dict)
    distilled = all(f"{head}.{name}" in ours for head in ("head", "head_dist") for name in _HEAD)
    return _merge_heads(ours) if distilled else ours


def rename(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors as `to_ours` does, and keep both classifiers of a distilled model.

    Args:
        state_dict: Name -> tensor, unwrapped.
    """
    return {_our_name(name): value for name, value in state_dict.items()}


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of one of our (or timm's) state dicts to the official names.

    Args:
        state_dict: Name -> tensor, unwrapped.
    """
    return {_official_name(name): value for name, value in state_dict.items()}


def _our_name(name: str) -> str:
    if match := _OFFICIAL_DOWNSAMPLE.fullmatch(name):
        stage, part, rest = match.groups()
        return f"stages.{int(stage) - 1}.downsample.{_DOWNSAMPLE.index(part)}.{rest}"
    if match := _OFFICIAL_BLOCK.fullmatch(name):
        stage, block = int(match[1]) - 1, int(match[2])
        block -= _FIRST_BLOCK if stage > 0 else 0
        return f"stages.{stage}.blocks.{block}.{match[3]}" if block >= 0 else name
    return name


def _official_name(name: str) -> str:
    match = _OUR_PART.fullmatch(name)
    if match is None:
        return name
    stage, index, rest = int(match[1]), int(match[3]), match[4]
    if match[2] == "downsample":
        return f"blocks{stage + 1}.{_DOWNSAMPLE[index]}.{rest}"
    return f"blocks{stage + 1}.{index + (_FIRST_BLOCK if stage > 0 else 0)}.{rest}"


def _merge_heads(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One BatchNorm + Linear whose output is the mean of `head` and `head_dist` in eval mode."""
    merged = {k: v for k, v in state_dict.items() if not k.startswith("head_dist.")}
    weight, bias = _fold_head(state_dict, "head")
    weight_dist, bias_dist = _fold_head(state_dict, "head_dist")
    mean, var = merged["head.bn.running_mean"], merged["head.bn.running_var"]
    # the two norms differ, so both are folded into the linear layer and the norm left undoes itself
    values = {
        "head.bn.weight": torch.sqrt(var.double() + _BN_EPS),
        "head.bn.bias": mean,
        "head.l.weight": (weight + weight_dist) / 2,
        "head.l.bias": (bias + bias_dist) / 2,
    }
    return merged | {name: value.to(merged[name].dtype) for name, value in values.items()}


def _fold_head(state_dict: Mapping[str, Tensor], head: str) -> tuple[Tensor, Tensor]:
    """Weight and bias, float64, of the linear layer that equals BatchNorm + Linear."""
    gamma, beta, mean, var, weight, bias = (state_dict[f"{head}.{n}"].double() for n in _HEAD)
    scale = gamma / torch.sqrt(var + _BN_EPS)
    return weight * scale, bias + weight @ (beta - mean * scale)
