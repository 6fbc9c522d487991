"""TiC: transformer in convolution, a reconstruction.

Paper: Zhang et al., "TiC: Exploring Vision Transformer in Convolution", 2023,
https://arxiv.org/abs/2310.04134
Official code: https://github.com/zs670980918/MSA-Conv, which has the attention (MSA-Conv) and one
layer, and neither the network nor weights

**This network is a reconstruction**: the attention equals the official code, what is around it was
put together from the paper's abstract. There are no official weights, and no published number is
claimed for it. What the abstract leaves open is an argument of `TiC`.

A 7x7 convolution, then four stages at strides 4 to 32, pooled between them (the inter-pooling
mechanism). Blocks attend within windows; in every second one the map is rolled, in another
direction for every head (the multi-directional cyclic shifted mechanism). Positions come from the
zeros around the map alone, so that nothing depends on the image size.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm,
    LayerNorm2d,
    calculate_drop_path_rates,
)
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from backbones.pretrained import convert_state_dict

from ._backbone import (
    HeadedBackbone,
    check_pool,
    check_pyramid,
    check_stages,
    init_truncated,
)
from ._builder import build_model
from ._registry import register_model
from .layers import ChannelsLastStage, NeighborhoodAttention
from .layers.fold import fold_layer_norm
from .layers.mlp import Mlp
from .layers.strided import OverlappingPool2d

__all__ = ["TiC"]

_EPS = 1e-6
_DIRECTIONS = ((1, 1), (1, -1), (-1, 1), (-1, -1))
_SHIFTS = ("head", "block", "none")
_POOLS = ("max", "avg")

Pair = tuple[int, int]
Dilation = int | Sequence[int | Sequence[int]]


class Block(nn.Module):
    """Attention within windows and a feed forward network, both normed before and residual.

    Args:
        dim: Width of the map.
        num_heads: Heads of the attention.
        kernel_size: Side of a window.
        dilation: Distance of its pixels.
        shifts: How far the map is rolled, for the heads in turn.
        proj: Whether the attention ends with a linear layer.
        drop_path: Probability that training drops a branch.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        shifts: Sequence[Pair] = (),
        proj: bool = True,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, eps=_EPS, **dd)
        self.attn = NeighborhoodAttention(
            dim, num_heads, kernel_size, dilation, shifts, proj=proj, **dd
        )
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=_EPS, **dd)
        self.mlp = Mlp(dim, 4 * dim, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    @torch.no_grad()
    def fuse(self) -> Block:
        """Fold norm weights into the linear layers behind them; return the block."""
        self.norm1 = self.attn.fold_norm(self.norm1)
        self.norm2 = fold_layer_norm(self.norm2, self.mlp.fc1)
        return self


class Downsample(nn.Module):
    """Pooling of 3x3 windows with stride 2, a LayerNorm and a linear layer.

    Args:
        in_dim: Input width.
        dim: Output width.
        pool: "max" or "avg"; what lies outside the map counts in neither.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self, in_dim: int, dim: int, pool: str = "max", device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pool = OverlappingPool2d(average=pool == "avg")
        self.norm = LayerNorm(in_dim, eps=_EPS, **dd)
        self.proj = nn.Linear(in_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, in_dim, H, W)`, return `(B, dim, ceil(H / 2), ceil(W / 2))`."""
        return self.proj(self.norm(self.pool(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    @torch.no_grad()
    def fuse(self) -> Downsample:
        """Fold the weights of the norm into the linear layer; return the layer."""
        self.norm = fold_layer_norm(self.norm, self.proj)
        return self


class TiC(HeadedBackbone):
    """TiC (arXiv 2310.04134), reconstructed: images `(B, in_chans, H, W)`, 32x32 or larger.

    The attention is the official one. The network is not: no model was ever released, there are no
    weights, and no published number is claimed. Heads, windows, dilation, shifts, pooling and
    projection are what the paper's abstract names and leaves open.

    `pyramid="det"` gives each of the four features a LayerNorm, as the official backbones of
    detectors do in other families; what follows does not see it. A pyramid is for `features_only`
    and `forward_intermediates`; it has no classifier, whatever `num_classes` is, and no norm before
    it.

    `fuse()` folds the norms of blocks and between stages into the linear layers behind them.

    Args:
        embed_dims: Widths of the stages.
        depths: Blocks of each stage.
        num_heads: Heads of each stage; as many as its width attend channel by channel.
        kernel_size: Side of the windows, odd.
        dilation: Distance of the pixels of a window: one for all, or for each stage one, or one for
            each of its blocks.
        shift: How the second, fourth and so on block of a stage rolls the map, by half a window
            downwards or upwards and to the right or to the left: "head" in these four directions,
            one after the other, for the heads in turn; "block" in one for all heads, and the next
            one in the next such block of the network; "none" not at all.
        pool: Pooling between stages: "max" or "avg".
        attn_proj: Whether the attentions end with a linear layer.
        pyramid: "det", see above; "" for none.
        in_chans: Channels of the images.
        num_classes: Classes, 0 for no classifier.
        global_pool: Pooling before the classifier: "avg", "max", "avgmax", or "" for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Probability that training drops a branch of the last block; it rises from 0.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ValueError: Stages that do not fit together; a kernel, shift, pooling or pyramid that is not
            available.
    """

    def __init__(
        self,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        kernel_size: int = 7,
        dilation: Dilation = 1,
        shift: str = "head",
        pool: str = "max",
        attn_proj: bool = True,
        pyramid: str = "",
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_chans, 0 if pyramid else num_classes)
        dd = {"device": device, "dtype": dtype}
        check_pyramid(pyramid)
        check_stages(embed_dims, depths, num_heads)
        _check_choice("shift", shift, _SHIFTS)
        _check_choice("pool", pool, _POOLS)
        check_pool(global_pool)
        self.drop_rate = drop_rate
        self.stem = _stem(in_chans, embed_dims[0], **dd)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        windows = _windows(kernel_size, _dilations(dilation, depths), shift)
        stages, self.feature_info, in_dim = [], [], embed_dims[0]
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            blocks = [
                Block(dim, heads, kernel_size, *next(windows), attn_proj, rate, **dd)
                for rate in rates[i]
            ]
            downsample = Downsample(in_dim, dim, pool, **dd) if i else nn.Identity()
            stages.append(ChannelsLastStage(downsample, blocks))
            self.feature_info.append(
                {"num_chs": dim, "reduction": 2 ** (i + 2), "module": f"stages.{i}"}
            )
            in_dim = dim
        self.stages = nn.Sequential(*stages)
        norm = partial(LayerNorm2d, eps=_EPS, **dd)
        self._set_feature_norms(norm if pyramid else None)
        self.norm = nn.Identity() if pyramid else norm(in_dim)
        self.num_features = self.head_hidden_size = in_dim
        self.head = ClassifierHead(in_dim, self.num_classes, global_pool, drop_rate, **dd)
        self.apply(init_truncated)

    def forward_stem(self, x: Tensor) -> Tensor:
        """Embed images `(B, in_chans, H, W)` at a quarter of their size, rounded up."""
        return self.stem(x)


def _stem(in_chans: int, dim: int, **dd: Any) -> nn.Sequential:
    """A 7x7 convolution of stride 4 and a LayerNorm."""
    layers = [
        ("conv", nn.Conv2d(in_chans, dim, 7, 4, 3, **dd)),
        ("norm", LayerNorm2d(dim, eps=_EPS, **dd)),
    ]
    return nn.Sequential(OrderedDict(layers))


def _dilations(dilation: Dilation, depths: Sequence[int]) -> list[list[int]]:
    """The dilation of every block of every stage."""
    stages = [dilation] * len(depths) if isinstance(dilation, int) else list(dilation)
    if len(stages) != len(depths):
        raise ValueError(f"dilation={dilation} must be a number, or have one for each stage")
    found = [
        [stage] * depth if isinstance(stage, int) else list(stage)
        for stage, depth in zip(stages, depths, strict=True)
    ]
    if [len(blocks) for blocks in found] != list(depths):
        raise ValueError(f"dilation={dilation} must have one for each block: depths={depths}")
    return found


def _windows(
    kernel_size: int, dilations: list[list[int]], shift: str
) -> Iterator[tuple[int, tuple[Pair, ...]]]:
    """Dilation and shifts of every block, in the order of the network."""
    turns = itertools.cycle(_DIRECTIONS)
    for blocks in dilations:
        for index, dilation in enumerate(blocks):
            step = dilation * (kernel_size // 2)
            directions: Sequence[Pair] = ()
            if index % 2 and shift != "none":
                directions = _DIRECTIONS if shift == "head" else (next(turns),)
            yield dilation, tuple((step * y, step * x) for y, x in directions)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {choices}")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring a state dict, bare or wrapped by a training script, to the names of `model`."""
    return convert_state_dict(state_dict, model, require_head=False)


_CFG = {
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "first_conv": "stem.conv",
    "classifier": "head.fc",
    "origin_url": "https://github.com/zs670980918/MSA-Conv",
    "paper_ids": "arXiv:2310.04134",
    "description": "A reconstruction from the paper's abstract; there are no official weights.",
}
default_cfgs = generate_default_cfgs({f"tic_{size}": _CFG for size in ("tiny", "small", "base")})


def _create_tic(variant: str, pretrained: bool, args: dict[str, Any], **kwargs: Any) -> TiC:
    return build_model(
        TiC,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**args, **kwargs},
    )


@register_model
def tic_tiny(pretrained: bool = False, **kwargs: Any) -> TiC:
    """TiC-T, a reconstruction without weights: 27.1 M parameters, 4.39 GMACs at 224."""
    return _create_tic("tic_tiny", pretrained, {}, **kwargs)


@register_model
def tic_small(pretrained: bool = False, **kwargs: Any) -> TiC:
    """TiC-S, a reconstruction without weights: 48.4 M parameters, 8.64 GMACs at 224."""
    return _create_tic("tic_small", pretrained, {"depths": (2, 2, 18, 2)}, **kwargs)


@register_model
def tic_base(pretrained: bool = False, **kwargs: Any) -> TiC:
    """TiC-B, a reconstruction without weights: 85.6 M parameters, 15.24 GMACs at 224."""
    args = {
        "embed_dims": (128, 256, 512, 1024),
        "depths": (2, 2, 18, 2),
        "num_heads": (4, 8, 16, 32),
    }
    return _create_tic("tic_base", pretrained, args, **kwargs)
