"""BiFormer: vision transformer with bi-level routing attention.

Paper: Zhu et al., CVPR 2023, https://arxiv.org/abs/2303.08810
Official code: https://github.com/rayleizhu/BiFormer (MIT); its links to the weights are dead

Four stages at strides 4 to 32. In the first three, regions of a map attend to the few regions that
fit them best; in the last, all tokens attend to all. Positions come from convolutions. Names with
`stl` have the layout of Swin-T: patches instead of overlapping convolutions, and no position
convolutions between blocks. `stl_nchw` is the authors' later version of it, with weights of its
own: other regions where the map is no multiple of `n_win`, and 1x1 convolutions as linear layers.

Nothing depends on the image size. Maps that regions do not fill are padded as by the official
`auto_pad`, which changes nothing where the official code runs without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import ClassifierHead, LayerNorm2d, calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn

from backbones.pretrained import convert_state_dict
from backbones.pretrained.biformer import WEIGHTS

from ._backbone import HeadedBackbone, check_pool, check_pyramid
from ._builder import build_model, generate_cfgs
from ._registry import register_model
from .layers import (
    BiLevelRoutingAttention,
    ChannelsLastStage,
    ConvNormAct,
    LepeAttention,
    RoutingBlock,
)
from .layers.fold import batch_norm_affine, fold_output
from .layers.pointwise import replace_linear

__all__ = ["BiFormer"]


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2 with BatchNorm, and GELU between them.

    Args:
        in_chans: Channels of the images.
        dim: Output width.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(self, in_chans: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = ConvNormAct(in_chans, dim // 2, stride=2, **dd)
        self.conv2 = ConvNormAct(dim // 2, dim, stride=2, act_layer=None, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take images `(B, in_chans, H, W)`, return `(B, dim, ceil(H / 4), ceil(W / 4))`."""
        return self.conv2(self.conv1(x))


class PatchStem(nn.Module):
    """A convolution of patches of 4x4 pixels and a BatchNorm.

    Args:
        in_chans: Channels of the images.
        dim: Output width.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(self, in_chans: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_chans, dim, 4, 4, **dd)
        self.bn: nn.Module = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take images `(B, in_chans, H, W)`, return `(B, dim, H // 4, W // 4)`."""
        return self.bn(self.conv(x))

    @torch.no_grad()
    def fuse(self) -> PatchStem:
        """Fold the norm into the convolution; return the stem."""
        if isinstance(self.bn, nn.BatchNorm2d):
            fold_output(self.conv, *batch_norm_affine(self.bn))
            self.bn = nn.Identity()
        return self


class PatchMerging(nn.Module):
    """A BatchNorm and a convolution of patches of 2x2 pixels.

    Args:
        in_dim: Input width.
        dim: Output width.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(self, in_dim: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.bn: nn.Module = nn.BatchNorm2d(in_dim, **dd)
        self.conv = nn.Conv2d(in_dim, dim, 2, 2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, in_dim, H, W)`, return `(B, dim, H // 2, W // 2)`."""
        return self.conv(self.bn(x))

    @torch.no_grad()
    def fuse(self) -> PatchMerging:
        """Fold the norm into the convolution, which has no padding; return the layer."""
        if isinstance(self.bn, nn.BatchNorm2d):
            scale, shift = batch_norm_affine(self.bn)
            assert self.conv.bias is not None
            self.conv.bias.add_(self.conv.weight.sum((2, 3)) @ shift)
            self.conv.weight.mul_(scale[:, None, None])
            self.bn = nn.Identity()
        return self


class BiFormer(HeadedBackbone):
    """BiFormer (arXiv 2303.08810): images `(B, in_chans, H, W)` of any size from 32x32 on.

    Larger images want a larger `n_win`: with 7, a region of the first stage has 64 tokens at
    224x224 and 1276 at 800x1216. Weights fit all of them. The authors take 8 for 512x512 crops and
    16 for detection.

    There are four features, the maps after the stages. `pyramid="det"` gives each of them a
    LayerNorm, as the official backbone of detectors does, for its weights and to train others: the
    norms are of the features only, what follows does not see them. A pyramid is for `features_only`
    and `forward_intermediates`; it has no classifier, whatever `num_classes` is, and no norm before
    it.

    `fuse()` folds BatchNorms into convolutions, and LayerNorm weights into the linear layers behind
    them, but for those before the local enhancement of the last stage.

    Args:
        embed_dims: Widths of the stages.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        mlp_ratio: Hidden width over width of the feed forward networks.
        n_win: Regions per side of a map.
        topks: Regions that a region attends to, for each stage; None for attention over all tokens.
        patches: Stem and downsampling by patches, and no position convolutions (Swin-T's layout).
        pointwise: The later version: regions as with `floor_regions` of `BiLevelRoutingAttention`,
            local enhancement of the values in the last stage too, and linear layers within blocks
            that are `PointwiseConv2d`.
        pyramid: "det", see above; "" for none.
        in_chans: Channels of the images.
        num_classes: Classes, 0 for no classifier.
        global_pool: Pooling before the classifier: "avg", "max", "avgmax", or "" for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Probability that training drops a branch of the last block; it rises from 0.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ValueError: Stages that do not fit together; more choices than regions; an unknown pyramid;
            a pooling that changes the width.
    """

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (2, 4, 8, 8),
        mlp_ratio: int = 3,
        n_win: int = 7,
        topks: Sequence[int | None] = (1, 4, 16, None),
        patches: bool = False,
        pointwise: bool = False,
        pyramid: str = "",
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_pyramid(pyramid)
        super().__init__(in_chans, 0 if pyramid else num_classes)
        dd = {"device": device, "dtype": dtype}
        _check_stages(embed_dims, depths, num_heads, topks, n_win)
        check_pool(global_pool)
        self.drop_rate = drop_rate
        self.stem = (PatchStem if patches else ConvStem)(in_chans, embed_dims[0], **dd)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages, self.feature_info, in_dim = [], [], embed_dims[0]
        for i, (dim, heads, topk) in enumerate(zip(embed_dims, num_heads, topks, strict=True)):
            attention = (
                partial(LepeAttention, num_heads=heads, lepe_on_values=pointwise)
                if topk is None
                else partial(
                    BiLevelRoutingAttention,
                    num_heads=heads,
                    n_win=n_win,
                    topk=topk,
                    floor_regions=pointwise,
                )
            )
            blocks = [
                RoutingBlock(dim, attention, mlp_ratio, not patches, rate, **dd)
                for rate in rates[i]
            ]
            stages.append(ChannelsLastStage(_downsample(in_dim, dim, i, patches, **dd), blocks))
            self.feature_info.append(
                {"num_chs": dim, "reduction": 2 ** (i + 2), "module": f"stages.{i}"}
            )
            in_dim = dim
        self.stages = nn.Sequential(*stages)
        if pointwise:
            replace_linear(self.stages)
        self._set_feature_norms(partial(LayerNorm2d, eps=1e-6, **dd) if pyramid else None)
        self.norm = nn.Identity() if pyramid else nn.BatchNorm2d(in_dim, **dd)
        self.num_features = self.head_hidden_size = in_dim
        self.head = ClassifierHead(in_dim, self.num_classes, global_pool, drop_rate, **dd)
        self.apply(_init_weights)

    def forward_stem(self, x: Tensor) -> Tensor:
        """Embed images `(B, in_chans, H, W)` at a quarter of their size."""
        return self.stem(x)

    @torch.no_grad()
    def fuse(self) -> BiFormer:
        """Fold what is exact for inference, in place; see `Backbone.fuse`."""
        super().fuse()
        if isinstance(self.norm, nn.BatchNorm2d):
            self.norm = _fixed_norm(self.norm)
        return self


def _downsample(in_dim: int, dim: int, stage: int, patches: bool, **dd: Any) -> nn.Module:
    if stage == 0:
        return nn.Identity()
    if patches:
        return PatchMerging(in_dim, dim, **dd)
    return ConvNormAct(in_dim, dim, stride=2, act_layer=None, **dd)


def _fixed_norm(norm: nn.BatchNorm2d) -> nn.Conv2d:
    """What a BatchNorm does with its statistics: a depthwise 1x1 convolution.

    Folding it into the classifier would change the features that users take before it.
    """
    scale, shift = batch_norm_affine(norm)
    conv = nn.Conv2d(norm.num_features, norm.num_features, 1, groups=norm.num_features)
    conv.weight = nn.Parameter(scale.reshape(-1, 1, 1, 1))
    conv.bias = nn.Parameter(shift)
    return conv.train(norm.training)


def _check_stages(
    dims: Sequence[int],
    depths: Sequence[int],
    heads: Sequence[int],
    topks: Sequence[int | None],
    n_win: int,
) -> None:
    if not len(dims) == len(depths) == len(heads) == len(topks):
        raise ValueError(
            f"embed_dims={dims}, depths={depths}, num_heads={heads} and topks={topks} must be of "
            "equal length"
        )
    for dim, count in zip(dims, heads, strict=True):
        if count < 1 or dim % count:
            raise ValueError(f"embed_dims={dims} must be multiples of num_heads={heads}")
    most = max((k for k in topks if k is not None), default=0)
    if n_win < 1 or most > n_win**2:
        raise ValueError(
            f"n_win={n_win} gives {max(n_win, 0) ** 2} regions, but topks={topks}: increase n_win"
        )


def _init_weights(module: nn.Module) -> None:
    # the official code leaves convolutions as PyTorch makes them, the pointwise ones too
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring an official state dict to the names of `model`."""
    return convert_state_dict(state_dict, model, require_head=False)


_cfgs = partial(generate_cfgs, pool_size=(7, 7), classifier="head.fc")
default_cfgs = {
    **_cfgs([row for row in WEIGHTS if "_stl" not in row.name], first_conv="stem.conv1.conv"),
    **_cfgs([row for row in WEIGHTS if "_stl" in row.name], first_conv="stem.conv"),
}


def _create_biformer(
    variant: str, pretrained: bool, args: dict[str, Any], **kwargs: Any
) -> BiFormer:
    return build_model(
        BiFormer,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**args, **kwargs},
    )


_SMALL = {"depths": (4, 4, 18, 4)}
_WIDE = {"embed_dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 8)}
_STL = {**_WIDE, "depths": (2, 2, 6, 2), "mlp_ratio": 4, "patches": True}


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-T: 13.1 M parameters, 2.2 GMACs at 224."""
    return _create_biformer("biformer_tiny", pretrained, {}, **kwargs)


@register_model
def biformer_small(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-S: 25.5 M parameters, 4.5 GMACs at 224."""
    return _create_biformer("biformer_small", pretrained, _SMALL, **kwargs)


@register_model
def biformer_base(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-B: 56.8 M parameters, 9.8 GMACs at 224."""
    return _create_biformer("biformer_base", pretrained, {**_SMALL, **_WIDE}, **kwargs)


@register_model
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer in Swin-T's layout: 28.4 M parameters, 4.6 GMACs at 224."""
    return _create_biformer("biformer_stl", pretrained, _STL, **kwargs)


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer in Swin-T's layout, later version: 28.4 M parameters, 4.6 GMACs at 224."""
    args = {**_STL, "pointwise": True}
    return _create_biformer("biformer_stl_nchw", pretrained, args, **kwargs)
