"""RAVLT: official weights and their tensor names.

Source: Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", CVPR 2025,
arXiv:2411.07635; https://github.com/qhfan/RALA; weights at https://huggingface.co/aldjalkdf/RAVLT.
That repository also has detectors (`retinanet_`, `maskrcnn_`, `Casmaskrcnn_`) and segmenters
(`fpn_`, `uper_`), of which `load_weights` keeps the backbone.

The official code keeps linear layers as 1x1 convolutions, scales of branches as maps of one pixel,
and rotation angles as buffers, which follow from the width of a head alone. Ours are linear layers,
vectors, and nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .table import Paper, Weights

PAPER = Paper(
    title="Breaking the Low-Rank Dilemma of Linear Attention",
    authors=("Qihang Fan", "Huaibo Huang", "Ran He"),
    venue="CVPR",
    year=2025,
    arxiv="2411.07635",
    code="https://github.com/qhfan/RALA",
    code_license="none",
)


def _weights(size: str, top1: float) -> Weights:
    return Weights(
        name=f"ravlt_{size}.in1k",
        hub_id="aldjalkdf/RAVLT",
        filename=f"RAVLT_{size.upper()}.pth",
        wrapping="under `model`, `model_ema` may be beside it: not seen",
        license="mit",
        top1={"repository": top1},
        paper=PAPER,
        note=(
            "The accuracy is that of an earlier readme of the repository. "
            "The training script keeps the better of plain and averaged weights, so a file may "
            "hold both, and which one the accuracy is of is not said: see ema= of load_weights. "
            "The licence is that of the hub's card; the official code has none."
        ),
    )


WEIGHTS: tuple[Weights, ...] = (
    _weights("t", 82.8),
    _weights("s", 84.4),
    _weights("b", 85.5),
    _weights("l", 85.8),
)

# channels of a head are 64, but in the stages of these widths
_WIDE_HEADS = {96: 96, 192: 96}

# parts of a block: the official name -> ours
_PARTS = {
    "pos": "cpe.proj",
    "norm1.norm": "norm1",
    "norm2.norm": "norm2",
    "attn.qkvo": "attn.qkvg",
    "attn.lepe": "attn.lepe",
    "attn.proj": "attn.proj",
    "ffn.fc1": "mlp.fc1",
    "ffn.dwconv": "mlp.dwconv",
    "ffn.fc2": "mlp.fc2",
}
_THEIR_PARTS = {ours: theirs for theirs, ours in _PARTS.items()}
_DOWNSAMPLE = {"reduction": "conv", "norm": "bn"}
_THEIR_DOWNSAMPLE = {ours: theirs for theirs, ours in _DOWNSAMPLE.items()}
_HEAD = {"proj": "head.proj.conv", "norm": "head.proj.bn", "head": "head.fc"}
_THEIR_HEAD = {ours: theirs for theirs, ours in _HEAD.items()}

_LEFT_OUT = re.compile(r"layers\.\d+\.RoPE\.angle")
_STEM = re.compile(r"patch_embed\.proj\.(\d+)\.(\w+)")
_GAMMA = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.gamma_([12])")
_BLOCK = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)\.(weight|bias)")
_BETWEEN = re.compile(r"layers\.(\d+)\.downsample\.(reduction|norm)\.(\w+)")
_FEATURE_NORM = re.compile(r"extra_norms\.(\d+)\.norm\.(weight|bias)")
_HEAD_LEAF = re.compile(r"(proj|norm|head)\.(\w+)")

_OUR_STEM = re.compile(r"stem\.(\d)\.(conv|bn)\.(\w+)")
_OUR_SCALE = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.ls([12])\.gamma")
_OUR_BLOCK = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)\.(weight|bias)")
_OUR_BETWEEN = re.compile(r"stages\.(\d+)\.downsample\.(conv|bn)\.(\w+)")
_OUR_HEAD_LEAF = re.compile(r"(head\.proj\.conv|head\.proj\.bn|head\.fc)\.(\w+)")
_OUR_FEATURE_NORM = re.compile(r"feature_norms\.(\d+)\.(weight|bias)")
_LINEAR = re.compile(r"stages\..+\.(attn\.qkvg|attn\.proj|mlp\.fc[12])\.weight|head\.fc\.weight")
_FIRST_SCALE = re.compile(r"stages\.(\d+)\.blocks\.0\.ls1\.gamma")


def to_ours(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an official state dict to this project's names, in our shapes.

    Of the classifier, and of the backbone of detectors, which norms every map that it hands out
    (`extra_norms`). Names that are ours already, and names of neither code, stay as they are. Left
    out are the buffers of rotation angles.

    Args:
        state_dict: Name -> tensor, unwrapped.
    """
    kept = {name: value for name, value in state_dict.items() if not _LEFT_OUT.fullmatch(name)}
    ours = {_our_name(name): value for name, value in kept.items()}
    return {name: _our_shape(name, value) for name, value in ours.items()}


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of one of our state dicts to the official names, in the official shapes.

    Args:
        state_dict: Name -> tensor, unwrapped.
    """
    official = {}
    for name, value in state_dict.items():
        official[_official_name(name)] = _official_shape(name, value)
        if match := _FIRST_SCALE.fullmatch(name):
            official[f"layers.{match[1]}.RoPE.angle"] = _angle(len(value))
    return official


def _our_name(name: str) -> str:
    if match := _STEM.fullmatch(name):
        # convolution, norm and activation count
        layer, kind = divmod(int(match[1]), 3)
        return f"stem.{layer}.{('conv', 'bn', 'act')[kind]}.{match[2]}"
    if match := _GAMMA.fullmatch(name):
        return f"stages.{match[1]}.blocks.{match[2]}.ls{match[3]}.gamma"
    if match := _BLOCK.fullmatch(name):
        stage, block, part, leaf = match.groups()
        return f"stages.{stage}.blocks.{block}.{_PARTS.get(part, part)}.{leaf}"
    if match := _BETWEEN.fullmatch(name):
        # theirs end a stage, ours begin the next
        return f"stages.{int(match[1]) + 1}.downsample.{_DOWNSAMPLE[match[2]]}.{match[3]}"
    if match := _HEAD_LEAF.fullmatch(name):
        return f"{_HEAD[match[1]]}.{match[2]}"
    if match := _FEATURE_NORM.fullmatch(name):
        return f"feature_norms.{match[1]}.{match[2]}"
    return name


def _official_name(name: str) -> str:
    if match := _OUR_STEM.fullmatch(name):
        index = 3 * int(match[1]) + (match[2] == "bn")
        return f"patch_embed.proj.{index}.{match[3]}"
    if match := _OUR_SCALE.fullmatch(name):
        return f"layers.{match[1]}.blocks.{match[2]}.gamma_{match[3]}"
    if match := _OUR_BLOCK.fullmatch(name):
        stage, block, part, leaf = match.groups()
        return f"layers.{stage}.blocks.{block}.{_THEIR_PARTS.get(part, part)}.{leaf}"
    if match := _OUR_BETWEEN.fullmatch(name):
        return f"layers.{int(match[1]) - 1}.downsample.{_THEIR_DOWNSAMPLE[match[2]]}.{match[3]}"
    if match := _OUR_HEAD_LEAF.fullmatch(name):
        return f"{_THEIR_HEAD[match[1]]}.{match[2]}"
    if match := _OUR_FEATURE_NORM.fullmatch(name):
        return f"extra_norms.{match[1]}.norm.{match[2]}"
    return name


def _our_shape(name: str, value: Tensor) -> Tensor:
    """A linear layer's weight `(out, in)`, a scale `(C,)`."""
    if value.ndim == 4 and _LINEAR.fullmatch(name):
        return value.flatten(1)
    return value.flatten() if _OUR_SCALE.fullmatch(name) else value


def _official_shape(name: str, value: Tensor) -> Tensor:
    """A 1x1 convolution's weight `(out, in, 1, 1)`, a scale `(1, C, 1, 1)`."""
    if _LINEAR.fullmatch(name):
        return value[:, :, None, None]
    return value[None, :, None, None] if _OUR_SCALE.fullmatch(name) else value


def _angle(width: int) -> Tensor:
    """The official buffer of a stage: frequencies of pairs of channels, each twice `(D / 2,)`."""
    dim = _WIDE_HEADS.get(width, 64)
    return (1.0 / 10000 ** torch.linspace(0, 1, dim // 4)).repeat_interleave(2)
