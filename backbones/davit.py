"""DaViT: dual attention vision transformer.

Paper: Ding et al., ECCV 2022, https://arxiv.org/abs/2204.03645
Official code and weights: https://github.com/dingmyu/davit (MIT)
Names with `fl` are the image towers of Florence-2 (Xiao et al., https://arxiv.org/abs/2311.06242).

A 7x7 convolution, then four stages at strides 4 to 32. Blocks come in pairs, one with attention
within windows and one with attention between channels, each with convolutions that encode positions
and a feed forward network. Parameter names are timm's.

Nothing depends on the image size: windows that reach over the edge of a map see the bias of their
projection there, in all weights that there are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.layers import (
    ClassifierHead,
    LayerNorm2d,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    trunc_normal_,
)
from torch import Tensor, nn

from backbones.pretrained import convert_state_dict
from backbones.pretrained.davit import WEIGHTS

from ._backbone import HeadedBackbone, check_pool, check_pyramid, check_stages
from ._builder import build_model, generate_cfgs
from ._registry import register_model
from .layers import (
    ChannelAttention,
    ChannelsLastStage,
    ConvAttentionBlock,
    PatchConv2d,
    WindowAttention,
)
from .layers.dual_attention import Attention

__all__ = ["DaViT"]

_norm = partial(LayerNorm2d, eps=1e-5)
_Attentions = dict[str, Callable[..., Attention]]


class Stem(nn.Module):
    """A 7x7 convolution of stride 4 and a LayerNorm.

    Args:
        in_chans: Channels of the images.
        dim: Output width.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(self, in_chans: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        # its own padding reaches as far as timm's, which completes sizes to multiples of 4 first
        self.conv = nn.Conv2d(in_chans, dim, 7, 4, 3, **dd)
        self.norm = _norm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take images `(B, in_chans, H, W)`, return `(B, dim, ceil(H / 4), ceil(W / 4))`."""
        return self.norm(self.conv(x))


class Downsample(nn.Module):
    """A LayerNorm and a convolution of stride 2.

    The norm is never folded into the convolution: at the edge that takes zeros, not normed zeros.

    Args:
        in_dim: Input width.
        dim: Output width.
        kernel_size: 2 for patches, 3 for overlapping ones.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self, in_dim: int, dim: int, kernel_size: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = _norm(in_dim, **dd)
        self.conv = (
            PatchConv2d(in_dim, dim, **dd)
            if kernel_size == 2
            else nn.Conv2d(in_dim, dim, 3, 2, 1, **dd)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, in_dim, H, W)`, return `(B, dim, ceil(H / 2), ceil(W / 2))`."""
        return self.conv(self.norm(x))


class DaViT(HeadedBackbone):
    """DaViT (arXiv 2204.03645): images `(B, in_chans, H, W)` of any size from 32x32 on.

    `fuse()` folds the norms of the blocks into the linear layers behind them. The norm of the
    classifier stays, since pooled features are taken after it, and so do those before convolutions.

    There are four features, the maps after the stages. `pyramid="det"` gives each of them a
    LayerNorm, as the official backbone of detection and segmentation does, for its weights and to
    train others: the norms are of the features only, what follows does not see them. A pyramid is
    for `features_only` and `forward_intermediates`; it has no classifier, whatever `num_classes`
    is, and no norm before it.

    Args:
        embed_dims: Widths of the stages.
        depths: Pairs of blocks of each stage.
        num_heads: Heads, and groups of channels, of each stage.
        window_size: Rows and columns of a window.
        down_kernel_size: Side of the kernels between stages: 2, or 3 for overlapping patches.
        channel_attn_v2: Channel attention as in Florence-2 (see `ops.channel_attention`).
        named_blocks: Call the blocks of a pair `spatial_block` and `channel_block` in parameter
            names, as in Florence-2, instead of `0` and `1`.
        pyramid: "det", see above; "" for none.
        in_chans: Channels of the images.
        num_classes: Classes, 0 for no classifier.
        global_pool: Pooling before the classifier: "avg", "max", "avgmax", or "" for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Probability that training drops a branch of the last pair; it rises from 0.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ValueError: Stages that do not fit together; a size of windows or kernels that is not
            available; an unknown pyramid; a pooling that changes the width.
    """

    def __init__(
        self,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (1, 1, 3, 1),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        down_kernel_size: int = 2,
        channel_attn_v2: bool = False,
        named_blocks: bool = False,
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
        check_stages(embed_dims, depths, num_heads)
        _check_sizes(window_size, down_kernel_size)
        check_pool(global_pool)
        self.drop_rate = drop_rate
        self.stem = Stem(in_chans, embed_dims[0], **dd)
        # both blocks of a pair have one rate, as in timm; the official code counts blocks
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages, self.feature_info, in_dim = [], [], embed_dims[0]
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            attentions = _attentions(heads, (window_size, window_size), channel_attn_v2)
            downsample = Downsample(in_dim, dim, down_kernel_size, **dd) if i else nn.Identity()
            pairs = [_pair(dim, attentions, rate, named_blocks, **dd) for rate in rates[i]]
            stages.append(ChannelsLastStage(downsample, pairs))
            self.feature_info.append(
                {"num_chs": dim, "reduction": 2 ** (i + 2), "module": f"stages.{i}"}
            )
            in_dim = dim
        self.stages = nn.Sequential(*stages)
        self._set_feature_norms(partial(_norm, **dd) if pyramid else None)
        self.norm = nn.Identity()
        self.num_features = self.head_hidden_size = in_dim
        if pyramid:
            self.head = ClassifierHead(in_dim, 0, global_pool, drop_rate, **dd)
        else:
            self.head = NormMlpClassifierHead(
                in_dim, num_classes, None, global_pool, drop_rate, _norm, **dd
            )
        self.apply(_init_weights)

    def forward_stem(self, x: Tensor) -> Tensor:
        """Embed images `(B, in_chans, H, W)` at a quarter of their size, rounded up."""
        return self.stem(x)


def _attentions(heads: int, window: tuple[int, int], v2: bool) -> _Attentions:
    """What makes the attentions of a pair, in order."""
    return {
        "spatial_block": partial(WindowAttention, num_heads=heads, window_size=window),
        "channel_block": partial(ChannelAttention, num_heads=heads, mix_values=v2),
    }


def _pair(
    dim: int, attentions: _Attentions, drop_path: float, named: bool, **dd: Any
) -> nn.Sequential:
    """One block for each attention."""
    blocks = {
        name: ConvAttentionBlock(dim, attention, drop_path, **dd)
        for name, attention in attentions.items()
    }
    return nn.Sequential(OrderedDict(blocks)) if named else nn.Sequential(*blocks.values())


def _check_sizes(window_size: int, down_kernel_size: int) -> None:
    if window_size < 1:
        raise ValueError(f"window_size={window_size} must be positive")
    if down_kernel_size not in (2, 3):
        raise ValueError(f"down_kernel_size={down_kernel_size} is not available: use 2 or 3")


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring an official, Florence-2 or timm-style state dict to the names of `model`."""
    return convert_state_dict(state_dict, model, require_head=False)


default_cfgs = generate_cfgs(
    WEIGHTS, pool_size=(7, 7), first_conv="stem.conv", classifier="head.fc"
)


def _create_davit(variant: str, pretrained: bool, args: dict[str, Any], **kwargs: Any) -> DaViT:
    return build_model(
        DaViT,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**args, **kwargs},
    )


def _sizes(width: int, depths: tuple[int, ...], **kwargs: Any) -> dict[str, Any]:
    """Widths that double from stage to stage, heads of 32 channels."""
    widths = tuple(width * 2**stage for stage in range(len(depths)))
    heads = tuple(dim // 32 for dim in widths)
    return {"embed_dims": widths, "depths": depths, "num_heads": heads, **kwargs}


_DEPTHS = (1, 1, 9, 1)
_FLORENCE = {
    "window_size": 12,
    "down_kernel_size": 3,
    "channel_attn_v2": True,
    "named_blocks": True,
}


@register_model
def davit_tiny(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """DaViT-T: 28.4 M parameters, 4.52 GMACs at 224."""
    return _create_davit("davit_tiny", pretrained, _sizes(96, (1, 1, 3, 1)), **kwargs)


@register_model
def davit_small(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """DaViT-S: 49.7 M parameters, 8.77 GMACs at 224."""
    return _create_davit("davit_small", pretrained, _sizes(96, _DEPTHS), **kwargs)


@register_model
def davit_base(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """DaViT-B: 88.0 M parameters, 15.47 GMACs at 224."""
    return _create_davit("davit_base", pretrained, _sizes(128, _DEPTHS), **kwargs)


@register_model
def davit_large(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """DaViT-L: 196.8 M parameters, 34.5 GMACs at 224; no weights were released."""
    return _create_davit("davit_large", pretrained, _sizes(192, _DEPTHS), **kwargs)


@register_model
def davit_huge(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """DaViT-H: 348.9 M parameters, 61.2 GMACs at 224; no weights were released."""
    return _create_davit("davit_huge", pretrained, _sizes(256, _DEPTHS), **kwargs)


@register_model
def davit_giant(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """DaViT-G: 1406.5 M parameters, 192.8 GMACs at 224; no weights were released."""
    return _create_davit("davit_giant", pretrained, _sizes(384, (1, 1, 12, 3)), **kwargs)


@register_model
def davit_base_fl(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """Image tower of Florence-2-base: 90.4 M parameters, 189.9 GMACs at 768."""
    args = _sizes(128, _DEPTHS, **_FLORENCE)
    return _create_davit("davit_base_fl", pretrained, args, **kwargs)


@register_model
def davit_huge_fl(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """Image tower of Florence-2-large: 360.6 M parameters, 744.0 GMACs at 768."""
    args = _sizes(256, _DEPTHS, **_FLORENCE)
    return _create_davit("davit_huge_fl", pretrained, args, **kwargs)
