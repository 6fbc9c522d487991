"""DaViT: official weights and their tensor names.

Source: Ding et al., "DaViT: Dual Attention Vision Transformers", ECCV 2022, arXiv:2204.03645;
https://github.com/dingmyu/davit. The authors' files lie on personal pages that no program can
fetch; the hub has timm's copies. Weights of the large, huge and giant classifiers never appeared.

Names with `fl` are the image towers of Florence-2 (Xiao et al., arXiv:2311.06242).

Our tensor names are timm's. The originals have two other sets: that of the release, also with a
detector around it, and that of Florence-2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .table import Paper, Weights

PAPER = Paper(
    title="DaViT: Dual Attention Vision Transformers",
    authors=(
        "Mingyu Ding",
        "Bin Xiao",
        "Noel Codella",
        "Ping Luo",
        "Jingdong Wang",
        "Lu Yuan",
    ),
    venue="ECCV",
    year=2022,
    arxiv="2204.03645",
    code="https://github.com/dingmyu/davit",
    code_license="mit",
)
_FLORENCE = Paper(
    title="Florence-2: Advancing a Unified Representation for a Variety of Vision Tasks",
    authors=(
        "Bin Xiao",
        "Haiping Wu",
        "Weijian Xu",
        "Xiyang Dai",
        "Houdong Hu",
        "Yumao Lu",
        "Michael Zeng",
        "Ce Liu",
        "Lu Yuan",
    ),
    venue="CVPR",
    year=2024,
    arxiv="2311.06242",
    code="https://huggingface.co/microsoft/Florence-2-base",
    code_license="mit",
)


def _weights(model: str, paper: float, timm: float) -> Weights:
    return Weights(
        name=f"{model}.msft_in1k",
        hub_id=f"timm/{model}.msft_in1k",
        wrapping="bare",
        converted_from="the file that the readme of https://github.com/dingmyu/davit links",
        crop_pct=0.95,
        license="apache-2.0",
        top1={"paper": paper, "timm": timm},
        paper=PAPER,
        note=(
            "The authors' own code crops to 0.9. The licence is that of timm's copy; the authors "
            "state none apart from their code's."
        ),
    )


def _florence(model: str, release: str) -> Weights:
    return Weights(
        name=f"{model}.msft_florence2",
        hub_id=f"microsoft/{release}",
        filename="pytorch_model.bin",
        wrapping="bare, with a whole language model; the image tower is `vision_tower.`",
        num_classes=0,
        input_size=(3, 768, 768),
        crop_pct=0.95,
        license="mit",
        top1={},
        paper=replace(_FLORENCE, code=f"https://huggingface.co/microsoft/{release}"),
        note=(
            "The image tower of a larger file, without classifier. The licence is that of the "
            "release; timm's configuration says apache-2.0."
        ),
    )


WEIGHTS: tuple[Weights, ...] = (
    _weights("davit_tiny", paper=82.8, timm=82.694),
    _weights("davit_small", paper=84.2, timm=84.252),
    _weights("davit_base", paper=84.6, timm=84.652),
    _florence("davit_base_fl", "Florence-2-base"),
    _florence("davit_huge_fl", "Florence-2-large"),
)

_TOWER = "vision_tower."
_NAMED_BLOCK = ".spatial_block."
_HEAD = {"norms": "head.norm", "head": "head.fc"}
_THEIR_HEAD = {ours: theirs for theirs, ours in _HEAD.items()}
_CPE = {"cpe.0": "cpe1", "cpe.1": "cpe2"}
_THEIR_CPE = {ours: theirs for theirs, ours in _CPE.items()}

_EMBED = re.compile(r"(?:patch_embeds|convs)\.(\d+)\.(proj|norm)\.(\w+)")
_BLOCK = re.compile(r"main_blocks\.(\d+\.)(\d+\.\d+\.)(cpe\.[01])?(.+)")
_HEAD_LEAF = re.compile(r"(norms|head)\.(weight|bias)")
_FEATURE_NORM = re.compile(r"norm(\d)\.(weight|bias)")
_TOWER_BLOCK = re.compile(r"blocks\.(\d+)\.(\d+\.)(spatial|channel)_block\.(.+)\.(weight|bias)")

_OUR_EMBED = re.compile(r"(?:stem|stages\.(\d+)\.downsample)\.(conv|norm)\.(\w+)")
_OUR_BLOCK = re.compile(r"stages\.(\d+\.)blocks\.(\d+\.\d+\.)(cpe[12])?(.+)")
_OUR_HEAD_LEAF = re.compile(r"(head\.norm|head\.fc)\.(weight|bias)")
_OUR_FEATURE_NORM = re.compile(r"feature_norms\.(\d)\.(weight|bias)")
_OUR_NAMED_BLOCK = re.compile(
    r"stages\.(\d+)\.blocks\.(\d+\.)(spatial|channel)_block\.(.+)\.(weight|bias)"
)


def _tower_parts(attention: str) -> dict[str, str]:
    """Florence-2's names of the parts of a block -> ours."""
    return {
        "conv1.fn.dw": "cpe1.proj",
        f"{attention}.norm": "norm1",
        f"{attention}.fn.qkv": "attn.qkv",
        f"{attention}.fn.proj": "attn.proj",
        "conv2.fn.dw": "cpe2.proj",
        "ffn.norm": "norm2",
        "ffn.fn.net.fc1": "mlp.fc1",
        "ffn.fn.net.fc2": "mlp.fc2",
    }


_PARTS = {"spatial": _tower_parts("window_attn"), "channel": _tower_parts("channel_attn")}
_THEIR_PARTS = {
    kind: {ours: theirs for theirs, ours in parts.items()} for kind, parts in _PARTS.items()
}


def to_ours(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an official state dict to this project's names, which are timm's.

    Names that are ours already, and names of neither code, stay as they are. Of Florence-2 only the
    image tower is taken. The official detectors norm every map that they take from the model
    (`norm0` to `norm3`). Neither of the two has the norm of a classifier: one that does nothing
    stands in for it. A model takes of all these norms what it has.

    Args:
        state_dict: Name -> tensor, unwrapped.
    """
    if any(name.startswith(_TOWER) for name in state_dict):
        tower = {n[len(_TOWER) :]: v for n, v in state_dict.items() if n.startswith(_TOWER)}
        return _add_head_norm({_from_tower(name): value for name, value in tower.items()})
    if not any(name.startswith("patch_embeds.") for name in state_dict):
        return dict(state_dict)
    ours = {_from_release(name): value for name, value in state_dict.items()}
    of_detector = any(_FEATURE_NORM.fullmatch(name) for name in state_dict)
    return _add_head_norm(ours) if of_detector else ours


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of one of our (or timm's) state dicts to the official names.

    Those of models with named blocks get the names of Florence-2, which has no classifier: `head`
    is left out.

    Args:
        state_dict: Name -> tensor, unwrapped.
    """
    if any(_NAMED_BLOCK in name for name in state_dict):
        tower = {n: v for n, v in state_dict.items() if not _OUR_HEAD_LEAF.fullmatch(n)}
        return {_TOWER + _to_tower(name): value for name, value in tower.items()}
    return {_to_release(name): value for name, value in state_dict.items()}


def _from_release(name: str) -> str:
    if match := _BLOCK.fullmatch(name):
        stage, block, cpe, rest = match.groups()
        return f"stages.{stage}blocks.{block}{_CPE.get(cpe, '')}{rest}"
    if match := _HEAD_LEAF.fullmatch(name):
        return f"{_HEAD[match[1]]}.{match[2]}"
    if match := _FEATURE_NORM.fullmatch(name):
        return f"feature_norms.{match[1]}.{match[2]}"
    return _from_embed(name)


def _to_release(name: str) -> str:
    if match := _OUR_BLOCK.fullmatch(name):
        stage, block, cpe, rest = match.groups()
        return f"main_blocks.{stage}{block}{_THEIR_CPE.get(cpe, '')}{rest}"
    if match := _OUR_HEAD_LEAF.fullmatch(name):
        return f"{_THEIR_HEAD[match[1]]}.{match[2]}"
    if match := _OUR_FEATURE_NORM.fullmatch(name):
        return f"norm{match[1]}.{match[2]}"
    return _to_embed(name, "patch_embeds")


def _from_tower(name: str) -> str:
    match = _TOWER_BLOCK.fullmatch(name)
    if match is None:
        return _from_embed(name)
    stage, block, kind, part, leaf = match.groups()
    ours = _PARTS[kind].get(part, part)
    return f"stages.{stage}.blocks.{block}{kind}_block.{ours}.{leaf}"


def _to_tower(name: str) -> str:
    match = _OUR_NAMED_BLOCK.fullmatch(name)
    if match is None:
        return _to_embed(name, "convs")
    stage, block, kind, part, leaf = match.groups()
    theirs = _THEIR_PARTS[kind].get(part, part)
    return f"blocks.{stage}.{block}{kind}_block.{theirs}.{leaf}"


def _from_embed(name: str) -> str:
    match = _EMBED.fullmatch(name)
    if match is None:
        return name
    layer = "stem" if match[1] == "0" else f"stages.{match[1]}.downsample"
    return f"{layer}.{match[2].replace('proj', 'conv')}.{match[3]}"


def _to_embed(name: str, layers: str) -> str:
    match = _OUR_EMBED.fullmatch(name)
    if match is None:
        return name
    return f"{layers}.{match[1] or 0}.{match[2].replace('conv', 'proj')}.{match[3]}"


def _add_head_norm(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add a norm of the classifier with weights of one and zero, as wide as the last stage."""
    widest = [v for n, v in state_dict.items() if n.endswith(".downsample.conv.bias")]
    if not widest or "head.norm.weight" in state_dict:
        return state_dict
    like = max(widest, key=len)
    norm = {"head.norm.weight": torch.ones_like(like), "head.norm.bias": torch.zeros_like(like)}
    return {**state_dict, **norm}
