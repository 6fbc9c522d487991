"""RAVLT: rank-augmented vision linear transformer.

Paper: Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", CVPR 2025,
https://arxiv.org/abs/2411.07635
Official code: https://github.com/qhfan/RALA (without a licence; this is written from the formulas)
Official weights: https://huggingface.co/aldjalkdf/RAVLT (MIT)

Four convolutions, then four stages at strides 4 to 32. The first two stages attend linearly, with
augmented ranks, the last two by softmax; positions come from convolutions and from rotations.
Nothing depends on the image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm,
    LayerNorm2d,
    LayerScale,
    calculate_drop_path_rates,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbones.pretrained import convert_state_dict
from backbones.pretrained.ravlt import WEIGHTS

from ._backbone import HeadedBackbone, check_pool, check_pyramid, init_truncated
from ._builder import build_model, generate_cfgs
from ._registry import register_model
from .layers import (
    ConvNormAct,
    ConvPositionEncoding,
    DepthwiseMlp,
    ProjectionHead,
    RankAugmentedAttention,
    RotaryAttention,
)
from .layers.fold import fold_layer_norm, fold_layer_scale

__all__ = ["RAVLT"]

_MLP_RATIO = 3.5
_LINEAR_STAGES = 2


class Block(nn.Module):
    """Position encoding, attention, feed forward network, the latter two scaled and residual.

    The position encoding computes the norm behind it, from the parameters of `norm1`: this module
    is not called, nor are its hooks.

    Args:
        dim: Width of the map.
        num_heads: Heads of the attention.
        linear: Linear attention, else softmax.
        layer_scale: First value of the scales of both branches.
        drop_path: Probability that training drops a branch.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        linear: bool,
        layer_scale: float,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        attention = RankAugmentedAttention if linear else RotaryAttention
        self.cpe = ConvPositionEncoding(dim, **dd)
        self.norm1 = LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attention(dim, num_heads, **dd)
        self.ls1 = LayerScale(dim, layer_scale, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = DepthwiseMlp(dim, int(_MLP_RATIO * dim), **dd)
        self.ls2 = LayerScale(dim, layer_scale, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`; `rotary` is its table (`RotaryPosition`)."""
        x, y = self.cpe(x, self.norm1.weight, self.norm1.bias, self.norm1.eps)
        x = x + self.drop_path1(self.ls1(self.attn(y, rotary)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    @torch.no_grad()
    def fuse(self) -> Block:
        """Fold norm weights and scales into the linear layers; return the block."""
        self.norm1 = self.attn.fold_norm(self.norm1)
        self.norm2 = fold_layer_norm(self.norm2, self.mlp.fc1)
        self.ls1 = fold_layer_scale(self.attn.proj, self.ls1)
        self.ls2 = fold_layer_scale(self.mlp.fc2, self.ls2)
        return self


class Stage(nn.Module):
    """Blocks of one width, after a downsampling if there is one.

    Args:
        downsample: What comes before the blocks.
        blocks: On maps `(B, H, W, dim)`.
    """

    # torch.jit.script stumbles over annotations of a module class
    if TYPE_CHECKING:
        blocks: Any

    def __init__(self, downsample: nn.Module, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, in_dim, H, W)`, return the stage's `(B, dim, H, W)`."""
        x = self.downsample(x).permute(0, 2, 3, 1)
        rotary = self.blocks[0].attn.rotary(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, rotary, use_reentrant=False)
            else:
                x = block(x, rotary)
        return x.permute(0, 3, 1, 2)


class RAVLT(HeadedBackbone):
    """RAVLT (arXiv 2411.07635): images `(B, in_chans, H, W)` of any size from 32x32 on.

    There are four features, the maps after the stages. `pyramid="det"` gives each of them a
    LayerNorm, as the official backbone of detectors does, for its weights and to train others: the
    norms are of the features only, what follows does not see them. A pyramid is for `features_only`
    and `forward_intermediates`; it has no classifier, whatever `num_classes` is.

    `fuse()` folds BatchNorms into their convolutions, LayerNorm weights into the linear layers
    behind them and the scales of the branches into those before.

    Args:
        embed_dims: Widths of the stages.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        layer_scales: First values of the scales of the branches, for each stage.
        head_hidden_size: Width of the projection before the classifier.
        pyramid: "det", see above; "" for none.
        in_chans: Channels of the images.
        num_classes: Classes, 0 for no classifier.
        global_pool: Pooling before the classifier: "avg", "max", "avgmax", or "" for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Probability that training drops a branch of the last block; it rises from 0.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ValueError: Stages that do not fit together; an unknown pyramid; a pooling that changes the
            width.
    """

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        layer_scales: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        head_hidden_size: int = 1024,
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
        _check_stages(embed_dims, depths, num_heads, layer_scales)
        check_pool(global_pool)
        self.drop_rate = drop_rate
        self.stem = _stem(in_chans, embed_dims[0], **dd)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages, self.feature_info, in_dim = [], [], embed_dims[0]
        for i, (dim, heads, scale) in enumerate(
            zip(embed_dims, num_heads, layer_scales, strict=True)
        ):
            blocks = [Block(dim, heads, i < _LINEAR_STAGES, scale, rate, **dd) for rate in rates[i]]
            downsample = (
                ConvNormAct(in_dim, dim, stride=2, act_layer=None, **dd) if i else nn.Identity()
            )
            stages.append(Stage(downsample, blocks))
            self.feature_info.append(
                {"num_chs": dim, "reduction": 2 ** (i + 2), "module": f"stages.{i}"}
            )
            in_dim = dim
        self.stages = nn.Sequential(*stages)
        self._set_feature_norms(partial(LayerNorm2d, eps=1e-6, **dd) if pyramid else None)
        self.norm = nn.Identity()
        self.num_features, self.head_hidden_size = in_dim, in_dim if pyramid else head_hidden_size
        if pyramid:
            self.head = ClassifierHead(in_dim, 0, global_pool, drop_rate, **dd)
        else:
            self.head = ProjectionHead(
                in_dim, num_classes, head_hidden_size, global_pool, drop_rate, **dd
            )
        self.apply(init_truncated)

    def forward_stem(self, x: Tensor) -> Tensor:
        """Embed images `(B, in_chans, H, W)` at a quarter of their size, rounded up."""
        return self.stem(x)


def _stem(in_chans: int, dim: int, **dd: Any) -> nn.Sequential:
    """Four 3x3 convolutions, the first and the last of stride 2."""
    half = dim // 2
    return nn.Sequential(
        ConvNormAct(in_chans, half, stride=2, **dd),
        ConvNormAct(half, half, **dd),
        ConvNormAct(half, half, **dd),
        ConvNormAct(half, dim, stride=2, act_layer=None, **dd),
    )


def _check_stages(
    dims: Sequence[int], depths: Sequence[int], heads: Sequence[int], scales: Sequence[float]
) -> None:
    if not len(dims) == len(depths) == len(heads) == len(scales):
        raise ValueError(
            f"embed_dims={dims}, depths={depths}, num_heads={heads} and layer_scales={scales} must "
            "be of equal length"
        )
    for dim, count in zip(dims, heads, strict=True):
        if count < 1 or dim % (4 * count):
            raise ValueError(f"embed_dims={dims} must be multiples of 4 * num_heads={heads}")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring an official state dict to the names of `model`."""
    return convert_state_dict(state_dict, model, require_head=False)


default_cfgs = generate_cfgs(
    WEIGHTS, pool_size=(7, 7), first_conv="stem.0.conv", classifier="head.fc"
)


def _create_ravlt(variant: str, pretrained: bool, args: dict[str, Any], **kwargs: Any) -> RAVLT:
    return build_model(
        RAVLT,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**args, **kwargs},
    )


@register_model
def ravlt_t(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-T: 14.9 M parameters, 2.63 GMACs at 224."""
    args = {"embed_dims": (64, 128, 256, 512), "depths": (2, 2, 6, 2), "num_heads": (1, 2, 4, 8)}
    return _create_ravlt("ravlt_t", pretrained, args, **kwargs)


@register_model
def ravlt_s(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-S: 25.6 M parameters, 4.90 GMACs at 224."""
    args = {"embed_dims": (64, 128, 320, 512), "depths": (3, 5, 9, 3), "num_heads": (1, 2, 5, 8)}
    return _create_ravlt("ravlt_s", pretrained, args, **kwargs)


@register_model
def ravlt_b(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-B: 48.2 M parameters, 10.62 GMACs at 224."""
    args = {
        "embed_dims": (96, 192, 384, 512),
        "depths": (4, 6, 12, 6),
        "num_heads": (1, 2, 6, 8),
        "layer_scales": (1.0, 1.0, 1e-6, 1e-6),
    }
    return _create_ravlt("ravlt_b", pretrained, args, **kwargs)


@register_model
def ravlt_l(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-L: 95.2 M parameters, 17.26 GMACs at 224."""
    args = {
        "embed_dims": (96, 192, 448, 640),
        "depths": (4, 7, 19, 8),
        "num_heads": (1, 2, 7, 10),
        "layer_scales": (1e-6, 1e-6, 1e-6, 1e-6),
    }
    return _create_ravlt("ravlt_l", pretrained, args, **kwargs)
