"""L2ViT: linear global attention next to window attention.

Paper: Zheng, "The Linear Attention Resurrection in Vision Transformer", 2025,
https://arxiv.org/abs/2501.16182
Official code and weights: https://github.com/ChuanyangZheng/L2ViT (MIT)

Two convolutions, then four stages at strides 4 to 32. Blocks alternate between attention within
windows and linear attention over the whole map; the latter is followed by two large depthwise
convolutions that concentrate what it has spread. Positions come from convolutions.

Nothing depends on the image size: images are completed with zeros to multiples of 4, and windows
that reach over the edge of a map see the bias of their projection there, in all released weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import ClassifierHead, LayerNorm2d, calculate_drop_path_rates
from torch import Tensor, nn

from backbones.pretrained import convert_state_dict
from backbones.pretrained.l2vit import WEIGHTS

from ._backbone import (
    HeadedBackbone,
    check_pool,
    check_pyramid,
    check_stages,
    init_truncated,
)
from ._builder import build_model, generate_cfgs
from ._registry import register_model
from .layers import (
    ChannelsLastStage,
    ConvAttentionBlock,
    ConvNormAct,
    LinearAttentionBlock,
    PatchConv2d,
    WindowAttention,
)

__all__ = ["L2ViT"]

_norm = partial(LayerNorm2d, eps=1e-5)


@torch.fx.wrap
def complete(x: Tensor) -> Tensor:
    """Add rows and columns of zeros below and to the right, up to multiples of 4.

    Args:
        x: Images `(B, C, H, W)`.

    Returns:
        Images `(B, C, 4 * ceil(H / 4), 4 * ceil(W / 4))`.
    """
    if torch.jit.is_scripting():
        return F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
    else:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            # whether there is anything to add, or to cut off, would be a condition of the graph
            height, width = (x.shape[2] + 3) // 4 * 4, (x.shape[3] + 3) // 4 * 4
            return F.pad(x, (0, 4, 0, 4))[:, :, :height, :width]
        return F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2 with BatchNorm, ReLU between them, and a LayerNorm.

    Args:
        in_chans: Channels of the images.
        dim: Output width.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(self, in_chans: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = ConvNormAct(in_chans, dim // 2, stride=2, act_layer=nn.ReLU, **dd)
        self.conv2 = ConvNormAct(dim // 2, dim, stride=2, act_layer=None, **dd)
        self.norm = _norm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take images `(B, in_chans, H, W)`, return `(B, dim, ceil(H / 4), ceil(W / 4))`."""
        return self.norm(self.conv2(self.conv1(complete(x))))


class L2ViT(HeadedBackbone):
    """L2ViT (arXiv 2501.16182): images `(B, in_chans, H, W)` of any size from 32x32 on.

    There are four features, the maps after the stages. `pyramid="det"` gives each of them a
    LayerNorm, as the official backbone of detection and segmentation does, for its weights and to
    train others: the norms are of the features only, what follows does not see them. A pyramid is
    for `features_only` and `forward_intermediates`; it has no classifier, whatever `num_classes`
    is, and no norm before it.

    Weight decay reaches the temperatures of the linear attention, as in the official recipe: they
    have three dimensions.

    `fuse()` folds BatchNorms of the stem into its convolutions, those between depthwise
    convolutions into a scale and a shift, and the norms before linear layers into these.

    Args:
        embed_dims: Widths of the stages.
        depths: Blocks of each stage; the first, third and so on attend within windows, the others
            linearly.
        num_heads: Heads of each stage.
        window_size: Rows and columns of a window. Weights fit all of them, outputs differ.
        pyramid: "det", see above; "" for none.
        in_chans: Channels of the images.
        num_classes: Classes, 0 for no classifier.
        global_pool: Pooling before the classifier: "avg", "max", "avgmax", or "" for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Probability that training drops a branch of the last block; it rises from 0.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ValueError: Stages that do not fit together; a size of windows below 1; an unknown pyramid;
            a pooling that changes the width.
    """

    def __init__(
        self,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
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
        check_stages(embed_dims, depths, num_heads)
        if window_size < 1:
            raise ValueError(f"window_size={window_size} must be positive")
        check_pool(global_pool)
        super().__init__(in_chans, 0 if pyramid else num_classes)
        dd = {"device": device, "dtype": dtype}
        self.drop_rate = drop_rate
        self.stem = Stem(in_chans, embed_dims[0], **dd)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages, self.feature_info, in_dim = [], [], embed_dims[0]
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            blocks = [
                _block(dim, heads, window_size, j % 2 == 1, rate, **dd)
                for j, rate in enumerate(rates[i])
            ]
            stages.append(ChannelsLastStage(_downsample(in_dim, dim, i, **dd), blocks))
            self.feature_info.append(
                {"num_chs": dim, "reduction": 2 ** (i + 2), "module": f"stages.{i}"}
            )
            in_dim = dim
        self.stages = nn.Sequential(*stages)
        self._set_feature_norms(partial(_norm, **dd) if pyramid else None)
        self.norm = nn.Identity() if pyramid else _norm(in_dim, **dd)
        self.num_features = self.head_hidden_size = in_dim
        self.head = ClassifierHead(in_dim, self.num_classes, global_pool, drop_rate, **dd)
        self.apply(init_truncated)

    def forward_stem(self, x: Tensor) -> Tensor:
        """Embed images `(B, in_chans, H, W)` at a quarter of their size, rounded up."""
        return self.stem(x)


def _block(
    dim: int, heads: int, window: int, linear: bool, drop_path: float, **dd: Any
) -> nn.Module:
    if linear:
        return LinearAttentionBlock(dim, heads, drop_path, **dd)
    attention = partial(WindowAttention, num_heads=heads, window_size=(window, window))
    return ConvAttentionBlock(dim, attention, drop_path, **dd)


def _downsample(in_dim: int, dim: int, stage: int, **dd: Any) -> nn.Module:
    """A LayerNorm and a convolution of patches; the zeros that complete odd maps are not normed."""
    if stage == 0:
        return nn.Identity()
    layers = [("norm", _norm(in_dim, **dd)), ("conv", PatchConv2d(in_dim, dim, **dd))]
    return nn.Sequential(OrderedDict(layers))


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring an official state dict to the names and the form of `model`."""
    return convert_state_dict(state_dict, model, require_head=False)


_cfgs = partial(generate_cfgs, first_conv="stem.conv1.conv", classifier="head.fc")
default_cfgs = {
    **_cfgs([row for row in WEIGHTS if row.model != "l2vit_base_384"], pool_size=(7, 7)),
    # the authors warp whole images to the square
    **_cfgs(
        [row for row in WEIGHTS if row.model == "l2vit_base_384"],
        pool_size=(12, 12),
        crop_mode="squash",
    ),
}


def _create_l2vit(variant: str, pretrained: bool, args: dict[str, Any], **kwargs: Any) -> L2ViT:
    return build_model(
        L2ViT,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**args, **kwargs},
    )


_BASE = {"embed_dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}


@register_model
def l2vit_tiny(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """L2ViT-T: 28.6 M parameters, 4.71 GMACs at 224."""
    return _create_l2vit("l2vit_tiny", pretrained, {}, **kwargs)


@register_model
def l2vit_small(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """L2ViT-S: 50.2 M parameters, 9.02 GMACs at 224."""
    return _create_l2vit("l2vit_small", pretrained, {"depths": (2, 2, 18, 2)}, **kwargs)


@register_model
def l2vit_base(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """L2ViT-B: 88.6 M parameters, 15.86 GMACs at 224."""
    return _create_l2vit("l2vit_base", pretrained, _BASE, **kwargs)


@register_model
def l2vit_base_384(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """L2ViT-B with windows of 12: 88.6 M parameters, 47.47 GMACs at 384."""
    args = {**_BASE, "window_size": 12}
    return _create_l2vit("l2vit_base_384", pretrained, args, **kwargs)
