"""MaxViT: official weights and their tensor names.

Source: Tu et al., "MaxViT: Multi-Axis Vision Transformer", ECCV 2022, arXiv:2204.01697;
https://github.com/google-research/maxvit. The weights are those that timm ported from TensorFlow
(`tf`) or trained itself (`rw`); our tensor names are timm's.

`to_ours` and `to_official` also know the names of the TensorFlow variables, for checkpoints that
were read into a mapping from name to tensor. They follow from the official code; no official
checkpoint was read here. TensorFlow's models for 384 and 512 keep position tables of windows of 7
and resize them while they are built: ours resize such tables too, but as timm does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .table import IMAGENET_MEAN, IMAGENET_STD, Paper, Weights

PAPER = Paper(
    title="MaxViT: Multi-Axis Vision Transformer",
    authors=(
        "Zhengzhong Tu",
        "Hossein Talebi",
        "Han Zhang",
        "Feng Yang",
        "Peyman Milanfar",
        "Alan Bovik",
        "Yinxiao Li",
    ),
    venue="ECCV",
    year=2022,
    arxiv="2204.01697",
    code="https://github.com/google-research/maxvit",
    code_license="apache-2.0",
)
# the same architecture, in timm's own variants, by timm's code
TIMM_PAPER = replace(PAPER, code="https://github.com/huggingface/pytorch-image-models")

_HALF = (0.5, 0.5, 0.5)
_CHECKPOINTS = "https://console.cloud.google.com/storage/browser/gresearch/maxvit/ckpts"
# tag -> folder of the official checkpoints
_FOLDERS = {"in1k": "i1k", "in21k": "i21k_pt", "in21k_ft_in1k": "i21k_i1k"}


def _weights(
    name: str,
    size: int,
    timm: float | None = None,
    paper: float | None = None,
    num_classes: int = 1000,
    crop_pct: float | None = None,
    imagenet: bool = False,
) -> Weights:
    official = "_tf_" in name
    return Weights(
        name=name,
        hub_id=f"timm/{name}",
        wrapping="bare",
        converted_from=_checkpoint(name, size) if official else "",
        num_classes=num_classes,
        input_size=(3, size, size),
        crop_pct=crop_pct or (0.95 if size < 384 else 1.0),
        crop_mode="center" if size < 384 else "squash",
        mean=IMAGENET_MEAN if imagenet else _HALF,
        std=IMAGENET_STD if imagenet else _HALF,
        license="apache-2.0",
        top1={k: v for k, v in (("paper", paper), ("timm", timm)) if v is not None},
        paper=PAPER if official else TIMM_PAPER,
        note="Ported from TensorFlow by timm." if official else "Trained by timm.",
    )


def _checkpoint(name: str, size: int) -> str:
    """Where the TensorFlow checkpoint lies that `maxvit_<width>_tf_<size>.<tag>` was made from."""
    model, _, tag = name.partition(".")
    return f"{_CHECKPOINTS}/maxvit{model.split('_')[1]}/{_FOLDERS[tag]}/{size}"


_RW = "maxvit_rmlp_base_rw"

WEIGHTS: tuple[Weights, ...] = (
    _weights("maxvit_tiny_tf_224.in1k", 224, 83.426, 83.62, imagenet=True),
    _weights("maxvit_tiny_tf_384.in1k", 384, 85.106, 85.24),
    _weights("maxvit_tiny_tf_512.in1k", 512, 85.658, 85.72),
    _weights("maxvit_small_tf_224.in1k", 224, 84.452, 84.45, imagenet=True),
    _weights("maxvit_small_tf_384.in1k", 384, 85.534, 85.74),
    _weights("maxvit_small_tf_512.in1k", 512, 86.102, 86.19),
    _weights("maxvit_base_tf_224.in1k", 224, 84.884, 84.95, imagenet=True),
    _weights("maxvit_base_tf_224.in21k", 224, num_classes=21843),
    _weights("maxvit_base_tf_384.in1k", 384, 86.290, 86.34),
    _weights("maxvit_base_tf_384.in21k_ft_in1k", 384, 87.930),
    _weights("maxvit_base_tf_512.in1k", 512, 86.598, 86.66),
    _weights("maxvit_base_tf_512.in21k_ft_in1k", 512, 88.214),
    _weights("maxvit_large_tf_224.in1k", 224, 84.938, 85.17, imagenet=True),
    _weights("maxvit_large_tf_224.in21k", 224, num_classes=21843),
    _weights("maxvit_large_tf_384.in1k", 384, 86.242, 86.40),
    _weights("maxvit_large_tf_384.in21k_ft_in1k", 384, 87.994),
    _weights("maxvit_large_tf_512.in1k", 512, 86.534, 86.70),
    _weights("maxvit_large_tf_512.in21k_ft_in1k", 512, 88.236),
    _weights("maxvit_xlarge_tf_224.in21k", 224, num_classes=21843),
    _weights("maxvit_xlarge_tf_384.in21k_ft_in1k", 384, 88.302),
    _weights("maxvit_xlarge_tf_512.in21k_ft_in1k", 512, 88.540, 88.70),
    _weights("maxvit_nano_rw_256.sw_in1k", 256, 82.934),
    _weights("maxvit_tiny_rw_224.sw_in1k", 224, 83.522),
    _weights("maxvit_rmlp_pico_rw_256.sw_in1k", 256, 80.550),
    _weights("maxvit_rmlp_nano_rw_256.sw_in1k", 256, 82.978),
    _weights("maxvit_rmlp_tiny_rw_256.sw_in1k", 256, 84.226),
    _weights("maxvit_rmlp_small_rw_224.sw_in1k", 224, 84.488, crop_pct=0.9),
    _weights(f"{_RW}_224.sw_in12k_ft_in1k", 224, 86.908),
    _weights(f"{_RW}_224.sw_in12k", 224, num_classes=11821),
    _weights(f"{_RW}_384.sw_in12k_ft_in1k", 384, 87.810),
)

_SCOPE = "maxvit/"
_AVERAGE = "/ExponentialMovingAverage"

# TensorFlow's names of the leaves of a layer -> ours
_CONV = {"kernel": "weight", "bias": "bias"}
_DEPTHWISE = {"depthwise_kernel": "weight"}
_DENSE = {"weight": "weight", "bias": "bias"}
_LAYER_NORM = {"gamma": "weight", "beta": "bias"}
_BATCH_NORM = {
    **_LAYER_NORM,
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}

_Layers = Mapping[str, tuple[str, Mapping[str, str]]]

_OUTER: _Layers = {
    "stem/conv_0": ("stem.conv1", _CONV),
    "stem/norm_0": ("stem.norm1", _BATCH_NORM),
    "stem/conv_1": ("stem.conv2", _CONV),
    "final_layer_norm": ("head.norm", _LAYER_NORM),
    "cls_head/inner_dense": ("head.pre_logits.fc", _DENSE),
    "cls_head/logit_dense": ("head.fc", _DENSE),
}
_BLOCK: _Layers = {
    "mbconv/shortcut_conv": ("conv.shortcut.expand", _CONV),
    "mbconv/pre_norm": ("conv.pre_norm", _BATCH_NORM),
    "mbconv/expand_conv": ("conv.conv1_1x1", _CONV),
    "mbconv/expand_norm": ("conv.norm1", _BATCH_NORM),
    "mbconv/depthwise_conv": ("conv.conv2_kxk", _DEPTHWISE),
    "mbconv/depthwise_norm": ("conv.norm2", _BATCH_NORM),
    "mbconv/se/reduce_conv2d": ("conv.se.fc1", _CONV),
    "mbconv/se/expand_conv2d": ("conv.se.fc2", _CONV),
    "mbconv/shrink_conv": ("conv.conv3_1x1", _CONV),
    "attn_layer_norm": ("attn_block.norm1", _LAYER_NORM),
    "attention": ("attn_block.attn.rel_pos", {"relative_bias": "relative_position_bias_table"}),
    "attention/q": ("attn_block.attn.q", _DENSE),
    "attention/k": ("attn_block.attn.k", _DENSE),
    "attention/v": ("attn_block.attn.v", _DENSE),
    "attention/o": ("attn_block.attn.proj", _DENSE),
    "ffn_layer_norm": ("attn_block.norm2", _LAYER_NORM),
    "ffn/expand_dense": ("attn_block.mlp.fc1", _DENSE),
    "ffn/shrink_dense": ("attn_block.mlp.fc2", _DENSE),
}


def _names(layers: _Layers) -> dict[str, str]:
    """TensorFlow's name -> ours, for every tensor of `layers`."""
    return {
        f"{theirs}/{their_leaf}": f"{ours}.{our_leaf}"
        for theirs, (ours, leaves) in layers.items()
        for their_leaf, our_leaf in leaves.items()
    }


# the grid's layers are named as the window's, with a number
_GRID = {
    re.sub(r"^(\w+)", r"\1_1", theirs): (ours.replace("attn_block", "attn_grid"), leaves)
    for theirs, (ours, leaves) in _BLOCK.items()
    if ours.startswith("attn_block")
}
_OUTER_NAMES, _BLOCK_NAMES = _names(_OUTER), _names({**_BLOCK, **_GRID})
_THEIR_OUTER_NAMES = {ours: theirs for theirs, ours in _OUTER_NAMES.items()}
_THEIR_BLOCK_NAMES = {ours: theirs for theirs, ours in _BLOCK_NAMES.items()}
_THEIR_BLOCK = re.compile(r"block_(\d\d)_(\d\d)/(.+)")
_OUR_BLOCK = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)")
_QKV = re.compile(r"(.+\.attn\.)([qkv])(\.\w+)")
_HEAD_DIM = 32


def to_ours(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an official state dict to this project's names, which are timm's.

    Names that are ours already, and names of neither code, stay as they are. Of TensorFlow's
    variables the moving averages are taken where there are any.

    Args:
        state_dict: Name -> tensor, unwrapped.
    """
    ours = {}
    # averages last: they replace what they are averages of
    for name in sorted(state_dict, key=lambda name: name.endswith(_AVERAGE)):
        theirs = name.removesuffix(_AVERAGE).removeprefix(_SCOPE)
        our_name = _our_name(theirs)
        if our_name is None:
            ours[name] = state_dict[name]
        else:
            ours[our_name] = _to_torch(theirs, state_dict[name])
            if our_name.endswith(".running_mean"):
                counter = our_name.removesuffix("running_mean") + "num_batches_tracked"
                ours[counter] = torch.zeros((), dtype=torch.int64)
    return _join_qkv(ours)


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of one of our (or timm's) state dicts to TensorFlow's names.

    Models with `rw` in their name have no other names than ours, and keep them.

    Args:
        state_dict: Name -> tensor, unwrapped.
    """
    # only the official stem has a bias
    if "stem.conv1.bias" not in state_dict:
        return dict(state_dict)
    official = {}
    for name, value in _split_qkv(state_dict).items():
        theirs = _their_name(name)
        if theirs is not None:
            official[_SCOPE + theirs] = _to_tensorflow(theirs, value)
        elif not name.endswith(".num_batches_tracked"):
            official[name] = value
    return official


def _our_name(theirs: str) -> str | None:
    match = _THEIR_BLOCK.fullmatch(theirs)
    if match is None:
        return _OUTER_NAMES.get(theirs)
    ours = _BLOCK_NAMES.get(match[3])
    return ours and f"stages.{int(match[1])}.blocks.{int(match[2])}.{ours}"


def _their_name(ours: str) -> str | None:
    match = _OUR_BLOCK.fullmatch(ours)
    if match is None:
        return _THEIR_OUTER_NAMES.get(ours)
    theirs = _THEIR_BLOCK_NAMES.get(match[3])
    return theirs and f"block_{int(match[1]):02d}_{int(match[2]):02d}/{theirs}"


def _join_qkv(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate the three projections of an attention."""
    joined: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        match = _QKV.fullmatch(name)
        if match is None:
            joined[name] = value
        elif match[2] == "q":
            parts = [state_dict.get(match[1] + part + match[3]) for part in "qkv"]
            joined[f"{match[1]}qkv{match[3]}"] = torch.cat([p for p in parts if p is not None])
    return joined


def _split_qkv(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the projections of every attention apart."""
    split = {}
    for name, value in state_dict.items():
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                split[name.replace(".qkv.", f".{part}.")] = piece
        else:
            split[name] = value
    return split


def _to_torch(theirs: str, value: Tensor) -> Tensor:
    """Bring a TensorFlow variable to PyTorch's order of dimensions."""
    layer, _, leaf = theirs.rpartition("/")
    if leaf == "kernel":
        return value.permute(3, 2, 0, 1).contiguous()
    if leaf == "depthwise_kernel":
        return value.permute(2, 3, 0, 1).contiguous()
    if layer.endswith(("/q", "/k", "/v")):
        value = value.flatten(-2)
    if layer.endswith("/o") and leaf == "weight":
        value = value.flatten(0, 1)
    return value.t().contiguous() if leaf == "weight" else value


def _to_tensorflow(theirs: str, value: Tensor) -> Tensor:
    """Undo `_to_torch`."""
    layer, _, leaf = theirs.rpartition("/")
    if leaf == "kernel":
        return value.permute(2, 3, 1, 0).contiguous()
    if leaf == "depthwise_kernel":
        return value.permute(2, 3, 0, 1).contiguous()
    if leaf == "weight":
        value = value.t().contiguous()
    if layer.endswith(("/q", "/k", "/v")):
        value = value.unflatten(-1, (-1, _HEAD_DIM))
    if layer.endswith("/o") and leaf == "weight":
        value = value.unflatten(0, (-1, _HEAD_DIM))
    return value
