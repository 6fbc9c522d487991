"""OverLoCK: official weights and their tensor names.

Source: Lou and Yu, "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing
Dynamic Kernels", CVPR 2025, arXiv:2502.20087; https://github.com/LMMMEng/OverLoCK; weights are
files of its release v1, in two forms: that which was trained (`in1k`) and that with merged large
kernels (`reparam_in1k`). The release also has detectors (`maskrcnn1x_`, `maskrcnn3x_`) and
segmenters (`upernet_`), of which `load_weights` keeps the backbone: that of a model with
`pyramid="det"` or `"seg"`.

The official code keeps linear layers as 1x1 convolutions, scales as `(C, 1, 1, 1)` and the vectors
of global response norms as `(1, C, 1, 1)`. Ours are linear layers and vectors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from .table import Paper, Weights

PAPER = Paper(
    title=(
        "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels"
    ),
    authors=("Meng Lou", "Yizhou Yu"),
    venue="CVPR",
    year=2025,
    arxiv="2502.20087",
    code="https://github.com/LMMMEng/OverLoCK",
    code_license="apache-2.0",
)

_RELEASE = "https://github.com/LMMMEng/OverLoCK/releases/download/v1"
_NOTE = (
    "The file could not be inspected when this was written: its hash and what wraps the state dict "
    "in it are not known. The accuracy is the authors', with their image size and crop. No licence "
    "is stated apart from the code's."
)


def _weights(size: str, crop_pct: float, top1: float, reparam: bool) -> Weights:
    file = f"overlock_{size}_in1k_224{'_reparam' if reparam else ''}.pth"
    return Weights(
        name=f"overlock_{size}.{'reparam_' if reparam else ''}in1k",
        hub_id=None,
        filename=file,
        urls=(f"{_RELEASE}/{file}",),
        direct=True,
        wrapping="bare or under `state_dict`: not seen",
        crop_pct=crop_pct,
        license="apache-2.0",
        top1={"repository": top1},
        paper=PAPER,
        note=_NOTE,
    )


WEIGHTS: tuple[Weights, ...] = tuple(
    _weights(size, crop_pct, top1, reparam)
    for size, crop_pct, top1 in (
        ("xt", 0.925, 82.7),
        ("t", 0.95, 84.2),
        ("s", 0.95, 84.8),
        ("b", 0.975, 85.1),
    )
    for reparam in (False, True)
)

# kernels beside a large one, by the official names: size and dilation
_BRANCHES = {
    17: ("k5_1", "k7_1", "k9_2", "k3_4", "k3_5", "k3_7"),
    15: ("k5_1", "k7_1", "k7_2", "k3_3", "k3_5", "k3_7"),
    13: ("k5_1", "k7_1", "k7_2", "k3_3", "k3_4", "k3_5"),
    7: ("k5_1", "k3_1", "k3_2", "k3_3"),
}
_GROUPS = {
    "blocks1": "stages.0.blocks",
    "blocks2": "stages.1.blocks",
    "blocks3": "stages.2.blocks",
    "blocks4": "overview.blocks",
    "sub_blocks3": "focus.0.blocks",
    "sub_blocks4": "focus.1.blocks",
}
_THEIR_GROUPS = {ours: theirs for theirs, ours in _GROUPS.items()}
_KERNELS = {
    "blocks1": 17,
    "blocks2": 15,
    "blocks3": 13,
    "blocks4": 7,
    "sub_blocks3": 13,
    "sub_blocks4": 7,
}

# parts of blocks before the focus: the official name -> ours
_BASE = {
    "dwconv": "cpe.proj",
    "proj.0": "norm",
    "proj.2": "conv.bn",
    "proj.3.proj.1": "se.fc1",
    "proj.3.proj.3": "se.fc2",
    "proj.4": "mlp.fc1",
    "proj.6": "mlp.dwconv",
    "proj.7": "mlp.grn",
    "proj.8": "mlp.fc2",
    "ls": "scale",
}
# parts of blocks of the focus, and of the ContMix block that stands alone
_FOCUS = {
    "x_scale": "context_scale",
    "h_scale": "prior_scale",
    "dwconv1": "cpe1.proj",
    "norm1": "norm1",
    "fusion.0": "fusion.dwconv",
    "fusion.1": "fusion.bn",
    "fusion.3": "fusion.fc",
    "fusion.4": "fusion.grn",
    "weight_query.0": "mixer.mixing.query.linear",
    "weight_query.1": "mixer.mixing.query.bn",
    "weight_key.1": "mixer.mixing.key.linear",
    "weight_key.2": "mixer.mixing.key.bn",
    "weight_value.0": "mixer.mixing.value.linear",
    "weight_value.1": "mixer.mixing.value.bn",
    "weight_proj": "mixer.mixing.kernel_proj",
    "dyconv_proj.0": "mixer.out.linear",
    "dyconv_proj.1": "mixer.out.bn",
    "lepe.1": "mixer.lepe.bn",
    "se_layer.proj.1": "mixer.se.fc1",
    "se_layer.proj.3": "mixer.se.fc2",
    "gate.0": "mixer.gate.linear",
    "gate.1": "mixer.gate.bn",
    "proj.0": "mixer.norm",
    "proj.1": "mixer.proj",
    "dwconv2": "cpe2.proj",
    "norm2": "norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.dwconv",
    "mlp.3": "mlp.grn",
    "mlp.4": "mlp.fc2",
    "ls1": "scale1",
    "ls2": "scale2",
}
_TABLES = {"rpb1": "mixer.mixing.table_small", "rpb2": "mixer.mixing.table_large"}
_LARGE = {"blocks": ("proj.1", "conv.rep"), "sub_blocks": ("lepe.0", "mixer.lepe.rep")}
_GRN_LEAF = {"gamma": "weight", "beta": "bias"}
# the rest of the model
_LAYERS = {
    **{f"patch_embed1.{3 * i}": f"stem.{i}.conv" for i in range(4)},
    **{f"patch_embed1.{3 * i + 1}": f"stem.{i}.bn" for i in range(4)},
    "patch_embed2.0": "stages.1.downsample.conv",
    "patch_embed2.1": "stages.1.downsample.bn",
    "patch_embed3.0": "stages.2.downsample.conv",
    "patch_embed3.1": "stages.2.downsample.bn",
    "patch_embed4.0": "overview.downsample.conv",
    "patch_embed4.1": "overview.downsample.bn",
    "high_level_proj": "context_proj",
    "patch_embedx.x_proj.0": "focus.1.downsample.conv",
    "patch_embedx.x_proj.1": "focus.1.downsample.bn",
    "patch_embedx.h_proj.0": "focus.1.context_downsample.conv",
    "patch_embedx.h_proj.1": "focus.1.context_downsample.bn",
    "aux_head.0": "aux_head.bn",
    "aux_head.2": "aux_head.fc",
    "head.0": "head.proj.conv",
    "head.1": "head.proj.bn",
    "head.4": "head.fc",
    **{f"extra_norm.{i}": f"feature_norms.{i}" for i in range(4)},
    "extra_norm.4": "overview_skip.norm",
    "h_proj.0": "overview_skip.proj",
    "h_proj.1": "overview_skip.scale",
}

_BLOCK = re.compile(r"((?:sub_)?blocks)(\d)\.(\d+)\.(.+)")
_OUR_BLOCK = re.compile(r"((?:stages\.\d|overview|focus\.\d)\.blocks)\.(\d+)\.(.+)")
_LINEAR = re.compile(
    r"(context_proj|overview_skip\.proj|head\.fc|aux_head\.fc"
    r"|.+\.(mlp\.fc[12]|fusion\.fc|linear|kernel_proj|mixer\.proj))\.weight"
)
_SCALE = re.compile(r"(.+[._])?scale[12]?\.weight")
_GRN = re.compile(r".+\.grn\.(weight|bias)")


def to_ours(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an official state dict to this project's names, in our shapes.

    Of both forms, and of the official backbones of detection and segmentation. Names that are ours
    already, and names of neither code, stay as they are.

    Args:
        state_dict: Name -> tensor, unwrapped.
    """
    ours = {_our_name(name): value for name, value in state_dict.items()}
    return {name: _our_shape(name, value) for name, value in ours.items()}


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of one of our state dicts to the official names, in the official shapes.

    Args:
        state_dict: Name -> tensor, unwrapped.
    """
    return {
        _official_name(name): _official_shape(name, value) for name, value in state_dict.items()
    }


def _our_name(name: str) -> str:
    if match := _BLOCK.fullmatch(name):
        kind, number, block, rest = match.groups()
        group = kind + number
        if group not in _GROUPS:
            return name
        return f"{_GROUPS[group]}.{block}.{our_part(rest, kind, _KERNELS[group])}"
    layer, _, leaf = name.rpartition(".")
    return f"{_LAYERS[layer]}.{leaf}" if layer in _LAYERS else name


def our_part(name: str, kind: str, kernel: int) -> str:
    """Our name of a tensor within a block.

    Args:
        name: Its official name there.
        kind: "blocks", or "sub_blocks" for the focus and for the block that stands alone.
        kernel: Side of the large kernel.
    """
    if name in _TABLES:
        return _TABLES[name]
    theirs, ours = _LARGE[kind]
    if name.startswith(f"{theirs}."):
        return f"{ours}.{_our_branch(name[len(theirs) + 1 :], kernel)}"
    parts = _BASE if kind == "blocks" else _FOCUS
    layer, _, leaf = name.rpartition(".")
    return f"{parts.get(layer, layer)}.{_GRN_LEAF.get(leaf, leaf)}"


def _our_branch(name: str, kernel: int) -> str:
    """Our name of a tensor of a large kernel and what is beside it."""
    layer, _, leaf = name.partition(".")
    if layer in ("lk_origin", "origin_bn"):
        return f"{'conv' if layer == 'lk_origin' else 'bn'}.{leaf}"
    _, kind, branch = layer.split("_", 2)
    branches = _BRANCHES[kernel]
    return f"branches.{branches.index(branch)}.{kind}.{leaf}" if branch in branches else name


def _official_name(name: str) -> str:
    if match := _OUR_BLOCK.fullmatch(name):
        group, block, rest = match.groups()
        theirs = _THEIR_GROUPS.get(group)
        return f"{theirs}.{block}.{_official_part(rest, theirs)}" if theirs else name
    layer, _, leaf = name.rpartition(".")
    return f"{_THEIR_LAYERS[layer]}.{leaf}" if layer in _THEIR_LAYERS else name


def _official_part(name: str, group: str) -> str:
    kind = group[:-1]
    if name in _THEIR_TABLES:
        return _THEIR_TABLES[name]
    theirs, ours = _LARGE[kind]
    if name.startswith(f"{ours}."):
        return f"{theirs}.{_official_branch(name[len(ours) + 1 :], _KERNELS[group])}"
    layer, _, leaf = name.rpartition(".")
    if layer.endswith(".grn"):
        leaf = {ours: theirs for theirs, ours in _GRN_LEAF.items()}.get(leaf, leaf)
    return f"{_THEIR_PARTS[kind].get(layer, layer)}.{leaf}"


def _official_branch(name: str, kernel: int) -> str:
    layer, _, leaf = name.partition(".")
    if layer != "branches":
        return f"{'lk_origin' if layer == 'conv' else 'origin_bn'}.{leaf}"
    number, kind, leaf = leaf.split(".")
    return f"dil_{kind}_{_BRANCHES[kernel][int(number)]}.{leaf}"


_THEIR_TABLES = {ours: theirs for theirs, ours in _TABLES.items()}
_THEIR_LAYERS = {ours: theirs for theirs, ours in _LAYERS.items()}
_THEIR_PARTS = {
    "blocks": {ours: theirs for theirs, ours in _BASE.items()},
    "sub_blocks": {ours: theirs for theirs, ours in _FOCUS.items()},
}


def _our_shape(name: str, value: Tensor) -> Tensor:
    """A linear layer's weight `(out, in)`, scales and vectors of norms `(C,)`."""
    if value.ndim == 4 and _LINEAR.fullmatch(name):
        return value.flatten(1)
    return value.flatten() if _SCALE.fullmatch(name) or _GRN.fullmatch(name) else value


def _official_shape(name: str, value: Tensor) -> Tensor:
    """A 1x1 convolution's weight, a scale `(C, 1, 1, 1)`, a norm's vector `(1, C, 1, 1)`."""
    if _LINEAR.fullmatch(name):
        return value[:, :, None, None]
    if _SCALE.fullmatch(name):
        return value[:, None, None, None]
    return value[None, :, None, None] if _GRN.fullmatch(name) else value
