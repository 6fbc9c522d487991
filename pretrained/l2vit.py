"""L2ViT: official weights and their tensor names.

Source: Zheng, "The Linear Attention Resurrection in Vision Transformer", arXiv:2501.16182;
https://github.com/ChuanyangZheng/L2ViT; weights are files of its release v1.0.

The classifier of the weights from ImageNet-22k has an order of classes of its own: see
`in22k_to_in1k_indices`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .errors import WeightsError
from .table import Paper, Weights

PAPER = Paper(
    title="The Linear Attention Resurrection in Vision Transformer",
    authors=("Chuanyang Zheng",),
    venue="",
    year=2025,
    arxiv="2501.16182",
    code="https://github.com/ChuanyangZheng/L2ViT",
    code_license="mit",
)

_RELEASE = "https://github.com/ChuanyangZheng/L2ViT/releases/download/v1.0"
_CLASSES_22K = 21841
_NOTE = (
    "The file could not be inspected when this was written: its hash and what it holds besides the "
    "weights are not known. No licence is stated apart from the code's."
)
_NOTE_EMA = (
    f"{_NOTE} Its name says that the moving average is meant, which is what is loaded if it has "
    "one; else the weights themselves."
)


def _weights(
    name: str, file: str, top1: float | None, size: int = 224, num_classes: int = 1000
) -> Weights:
    ema = file.endswith("-ema")
    return Weights(
        name=name,
        hub_id=None,
        filename=f"L2ViT-{file}.pth",
        urls=(f"{_RELEASE}/L2ViT-{file}.pth",),
        direct=True,
        prefer_ema=ema,
        wrapping="under `model`, `model_ema` may be beside it: not seen",
        num_classes=num_classes,
        input_size=(3, size, size),
        crop_pct=0.875 if size < 384 else 1.0,
        crop_mode="center" if size < 384 else "squash",
        license="mit",
        top1={} if top1 is None else {"repository": top1},
        paper=PAPER,
        note=_NOTE_EMA if ema else _NOTE,
    )


_PRETRAIN = "Base-22k-pretrain-checkpoint-best"
_FINETUNE = "Base-22k21k-finetune-{}-checkpoint-best"

WEIGHTS: tuple[Weights, ...] = (
    _weights("l2vit_tiny.in1k", "Tiny-checkpoint-best-ema", 83.1),
    _weights("l2vit_small.in1k", "Small-checkpoint-best-ema", 84.1),
    _weights("l2vit_base.in1k", "Base-checkpoint-best-ema", 84.4),
    _weights("l2vit_base.in22k", _PRETRAIN, None, num_classes=_CLASSES_22K),
    _weights("l2vit_base.in22k_ft_in1k", _FINETUNE.format(224), 86.0),
    _weights("l2vit_base_384.in22k_ft_in1k", _FINETUNE.format(384), 87.0, size=384),
)

# layers of the stem: the official name -> ours
_STEM = {
    "proj.proj.0": "conv1.conv",
    "proj.proj.1": "conv1.bn",
    "proj.proj.3": "conv2.conv",
    "proj.proj.4": "conv2.bn",
    "norm": "norm",
}
_DOWN = {"proj": "conv", "norm": "norm"}
# parts of a block
_PARTS = {
    "cpe.0.proj": "cpe1.proj",
    "cpe.1.proj": "cpe2.proj",
    "norm3": "local_norm",
    "local_mp.conv1": "local.conv1",
    "local_mp.bn": "local.bn",
    "local_mp.conv2": "local.conv2",
}
_THEIR_STEM = {ours: theirs for theirs, ours in _STEM.items()}
_THEIR_DOWN = {ours: theirs for theirs, ours in _DOWN.items()}
_THEIR_PARTS = {ours: theirs for theirs, ours in _PARTS.items()}

_LAYER = re.compile(r"downsample_layers\.(\d+)\.(.+)\.(\w+)")
_BLOCK = re.compile(r"stages\.(\d+)\.(\d+)\.(.+)")
_HEAD = re.compile(r"head\.(weight|bias)")
_FEATURE_NORM = re.compile(r"norm(\d+)\.(weight|bias)")

_OUR_LAYER = re.compile(r"(?:stem|stages\.(\d+)\.downsample)\.(.+)\.(\w+)")
_OUR_BLOCK = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)")
_OUR_HEAD = re.compile(r"head\.fc\.(weight|bias)")
_OUR_FEATURE_NORM = re.compile(r"feature_norms\.(\d+)\.(weight|bias)")
_CLASSIFIER = re.compile(r"head\.(?:fc\.)?(?:weight|bias)")


def to_ours(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an official state dict to this project's names.

    Of the classifier, and of the backbone of detection and segmentation. Names that are ours
    already, and names of neither code, stay as they are.

    Args:
        state_dict: Name -> tensor, unwrapped.
    """
    return {_our_name(name): value for name, value in state_dict.items()}


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of one of our state dicts to the official names.

    Args:
        state_dict: Name -> tensor, unwrapped.
    """
    return {_official_name(name): value for name, value in state_dict.items()}


def _our_name(name: str) -> str:
    if match := _BLOCK.fullmatch(name):
        stage, block, rest = match.groups()
        return f"stages.{stage}.blocks.{block}.{_rename(rest, _PARTS)}"
    if match := _LAYER.fullmatch(name):
        stage, layer, leaf = match.groups()
        if stage == "0":
            return f"stem.{_STEM.get(layer, layer)}.{leaf}"
        return f"stages.{stage}.downsample.{_DOWN.get(layer, layer)}.{leaf}"
    if match := _HEAD.fullmatch(name):
        return f"head.fc.{match[1]}"
    if match := _FEATURE_NORM.fullmatch(name):
        return f"feature_norms.{match[1]}.{match[2]}"
    return name


def _official_name(name: str) -> str:
    if match := _OUR_BLOCK.fullmatch(name):
        stage, block, rest = match.groups()
        return f"stages.{stage}.{block}.{_rename(rest, _THEIR_PARTS)}"
    if match := _OUR_LAYER.fullmatch(name):
        stage, layer, leaf = match.groups()
        layers = _THEIR_DOWN if stage else _THEIR_STEM
        return f"downsample_layers.{stage or 0}.{layers.get(layer, layer)}.{leaf}"
    if match := _OUR_HEAD.fullmatch(name):
        return f"head.{match[1]}"
    if match := _OUR_FEATURE_NORM.fullmatch(name):
        return f"norm{match[1]}.{match[2]}"
    return name


def _rename(name: str, parts: Mapping[str, str]) -> str:
    """The name of a tensor within a block, by the other code."""
    layer, _, leaf = name.rpartition(".")
    return f"{parts.get(layer, layer)}.{leaf}" if layer else name


@cache
def in22k_to_in1k_indices() -> tuple[int, ...]:
    """The class of the `in22k` weights, 0 to 21840, that every class of ImageNet-1k is, in order.

    The order of their classes is the authors' own; these numbers are from the official code.
    """
    text = Path(__file__).with_name("l2vit_in22k_to_in1k.txt").read_text()
    return tuple(int(line) for line in text.split())


def select_in1k(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reduce a classifier of ImageNet-22k to the classes of ImageNet-1k.

    This is how the official code starts the fine-tuning from `l2vit_base.in22k`:

        weights = select_in1k(load_weights("l2vit_base.in22k"))
        model.load_state_dict(convert_state_dict(weights, model))

    Args:
        state_dict: Name -> tensor, unwrapped, with official or our names.

    Returns:
        The same with a classifier of 1000 classes, in the order of ImageNet-1k.

    Raises:
        WeightsError: There is no classifier of 21841 classes.
    """
    heads = {n: v for n, v in state_dict.items() if _CLASSIFIER.fullmatch(n)}
    classes = {len(value) for value in heads.values()}
    if classes != {_CLASSES_22K}:
        found = " and ".join(str(count) for count in sorted(classes)) or "no"
        raise WeightsError(
            f"the weights have {found} classes, not {_CLASSES_22K}: give those of l2vit_base.in22k"
        )
    rows = torch.tensor(in22k_to_in1k_indices(), device=next(iter(heads.values())).device)
    return {**state_dict, **{name: value[rows] for name, value in heads.items()}}
