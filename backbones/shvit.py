"""SHViT: single-head vision transformer with memory-efficient macro design.

Paper: Yun and Ro, CVPR 2024, https://arxiv.org/abs/2401.16456
Official code and weights: https://github.com/ysj9909/SHViT (MIT)

A stem of four strided convolutions, then three stages at strides 16, 32 and 64: a depthwise
convolution, single-head attention over part of the channels (not in the first stage) and a feed
forward network per block, all with BatchNorm. Parameter names are timm's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import (
    GroupNorm1,
    SelectAdaptivePool2d,
    is_exportable,
)
from timm.models import checkpoint_seq
from torch import Tensor, nn

from backbones.ops import partial_attention, partial_attention_reference
from backbones.pretrained import convert_state_dict
from backbones.pretrained.shvit import WEIGHTS, rename, to_ours

from ._backbone import Backbone
from ._builder import build_model, generate_cfgs
from ._registry import register_model
from .layers import ConvNorm, NormLinear, Residual, SqueezeExcite
from .layers.channel_slice import with_slice

__all__ = ["SHViT"]


class FeedForward(nn.Module):
    """Two 1x1 convolutions around a ReLU, the inner width twice the outer.

    Args:
        dim: Outer width.
    """

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pw1 = ConvNorm(dim, 2 * dim, **dd)
        self.act = nn.ReLU(inplace=True)
        self.pw2 = ConvNorm(2 * dim, dim, gamma=0.0, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, dim, H, W)`."""
        return self.pw2(self.act(self.pw1(x)))


class SingleHeadAttention(nn.Module):
    """Single-head attention over the first channels of a map (paper section 3.2).

    The first `partial_dim` channels are normalised and attend over all tokens; the others pass.
    Attention, concatenation and ReLU are one op.

    Args:
        dim: Width of the map.
        partial_dim: Channels that attend.
        qk_dim: Channels of a query and of a key.
    """

    def __init__(
        self, dim: int, partial_dim: int, qk_dim: int = 16, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.partial_dim = partial_dim
        self.qk_dim = qk_dim
        self.exportable = is_exportable()
        self.pre_norm = GroupNorm1(partial_dim, **dd)
        self.qkv = ConvNorm(partial_dim, 2 * qk_dim + partial_dim, **dd)
        # index 0 is the ReLU of the released parameter names, done by the op
        self.proj = nn.Sequential(nn.Identity(), ConvNorm(dim, dim, gamma=0.0, **dd))

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, dim, H, W)`."""
        if self.exportable:
            attended = x[:, : self.partial_dim]
        else:
            x, attended = with_slice(x, 1, 0, self.partial_dim)
        qkv = self.qkv(self.pre_norm(attended))
        qkv, x = qkv.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)
        if self.exportable:
            x = partial_attention_reference(qkv, x, self.qk_dim)
        else:
            x = partial_attention(qkv, x, self.qk_dim)
        return self.proj(x.permute(0, 3, 1, 2))


class Block(nn.Module):
    """Depthwise convolution, attention, feed forward network, each with a residual.

    Args:
        dim: Width of the map.
        partial_dim: Channels that attend, None for a block without attention.
    """

    def __init__(
        self, dim: int, partial_dim: int | None, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = Residual(ConvNorm(dim, dim, 3, groups=dim, gamma=0.0, **dd))
        self.mixer = (
            nn.Identity()
            if partial_dim is None
            else Residual(SingleHeadAttention(dim, partial_dim, **dd))
        )
        self.ffn = Residual(FeedForward(dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, dim, H, W)`."""
        return self.ffn(self.mixer(self.conv(x)))


class PatchMerging(nn.Module):
    """Halve the resolution by an inverted bottleneck with squeeze-excite.

    After `fuse()` the depthwise convolution, both ReLU and the average are one op.

    Args:
        dim: Input width.
        out_dim: Output width.
    """

    __constants__ = ("exportable", "fused")

    def __init__(self, dim: int, out_dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = 4 * dim
        self.exportable, self.fused = is_exportable(), False
        self.conv1 = ConvNorm(dim, hidden, **dd)
        self.act1 = nn.ReLU(inplace=True)
        # a plain convolution after fuse()
        self.conv2: Any = ConvNorm(hidden, hidden, 3, stride=2, groups=hidden, **dd)
        self.act2 = nn.ReLU(inplace=True)
        self.se = SqueezeExcite(hidden, 0.25, **dd)
        self.conv3 = ConvNorm(hidden, out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, dim, H, W)`, return `(B, out_dim, ceil(H / 2), ceil(W / 2))`."""
        x = self.conv1(x)
        if self.fused and not self.exportable:
            conv = self.conv2
            x = self.se.forward_conv(x, conv.weight, conv.bias, 2, False, "relu", "relu")
        else:
            x = self.se(self.act2(self.conv2(self.act1(x))))
        return self.conv3(x)

    @torch.no_grad()
    def fuse(self) -> PatchMerging:
        """Fold the norm into the depthwise convolution; return the block."""
        if not self.fused:
            self.conv2 = self.conv2.fuse()
            self.fused = True
        return self


def _downsample(dim: int, out_dim: int, **dd: Any) -> nn.Sequential:
    return nn.Sequential(
        Residual(ConvNorm(dim, dim, 3, groups=dim, **dd)),
        Residual(FeedForward(dim, **dd)),
        PatchMerging(dim, out_dim, **dd),
        Residual(ConvNorm(out_dim, out_dim, 3, groups=out_dim, **dd)),
        Residual(FeedForward(out_dim, **dd)),
    )


class Stage(nn.Module):
    """Blocks of one width, after a downsampling unless this is the first stage.

    Args:
        in_dim: Width of the map that comes in.
        dim: Width of the stage.
        partial_dim: Channels that attend, None for a stage without attention.
        depth: Blocks.
        downsample: Halve the resolution first.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        partial_dim: int | None,
        depth: int,
        downsample: bool,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.downsample = _downsample(in_dim, dim, **dd) if downsample else nn.Identity()
        self.blocks = nn.Sequential(*(Block(dim, partial_dim, **dd) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, in_dim, H, W)`, return the stage's."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class SHViT(Backbone):
    """SHViT (arXiv 2401.16456): images `(B, in_chans, H, W)` of any size from 32x32 on.

    Args:
        embed_dim: Widths of the three stages; the first a multiple of 8.
        depth: Blocks of each stage.
        partial_dim: Channels that attend in each stage; the first stage has no attention.
        in_chans: Channels of the images.
        num_classes: Classes, 0 for no classifier.
        global_pool: Pooling before the classifier: "avg", "max", "avgmax", or "" for none.
        drop_rate: Dropout before the classifier.
        distilled: Add a second classifier, which learns from a teacher; the logits are the mean of
            the two.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ValueError: A pooling that changes the width.
    """

    if TYPE_CHECKING:
        head_dist: NormLinear | None

    def __init__(
        self,
        embed_dim: Sequence[int] = (128, 224, 320),
        depth: Sequence[int] = (2, 4, 5),
        partial_dim: Sequence[int] = (32, 48, 68),
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        distilled: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_chans, num_classes)
        dd = {"device": device, "dtype": dtype}
        self.drop_rate, self.distilled, self.distilled_training = drop_rate, distilled, False
        stem = [in_chans, *(embed_dim[0] // divisor for divisor in (8, 4, 2, 1))]
        layers: list[nn.Module] = []
        for in_dim, out_dim in itertools.pairwise(stem):
            layers += [ConvNorm(in_dim, out_dim, 3, stride=2, **dd), nn.ReLU(inplace=True)]
        self.patch_embed = nn.Sequential(*layers[:-1])

        stages, self.feature_info, in_dim = [], [], embed_dim[0]
        for i, dim in enumerate(embed_dim):
            attends = partial_dim[i] if i > 0 else None
            stages.append(Stage(in_dim, dim, attends, depth[i], downsample=i > 0, **dd))
            self.feature_info.append(
                {"num_chs": dim, "reduction": 2 ** (i + 4), "module": f"stages.{i}"}
            )
            in_dim = dim
        self.stages = nn.Sequential(*stages)
        self._set_feature_norms()
        self.norm = nn.Identity()
        self.num_features = self.head_hidden_size = embed_dim[-1]
        self._set_head(num_classes, global_pool, **dd)

    def _set_head(self, num_classes: int, global_pool: str, **dd: Any) -> None:
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool)
        if self.global_pool.feat_mult() != 1:
            raise ValueError(f"global_pool={global_pool!r} changes the width: use 'avg' or 'max'")
        self.flatten = nn.Flatten(1) if global_pool else nn.Identity()
        self.head = (
            NormLinear(self.head_hidden_size, num_classes, **dd) if num_classes else nn.Identity()
        )
        self.head_dist = None
        if self.distilled and num_classes:
            self.head_dist = NormLinear(self.head_hidden_size, num_classes, **dd)

    def forward_stem(self, x: Tensor) -> Tensor:
        """Embed images `(B, in_chans, H, W)` at a sixteenth of their size."""
        return self.patch_embed(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map `(B, num_features, H, W)` and classify it.

        Args:
            x: The map of the last stage.
            pre_logits: Return the pooled features `(B, head_hidden_size)` instead.

        Returns:
            Logits `(B, num_classes)`; after `set_distilled_training()`, in training, those of both
            classifiers, the second for the teacher's classes.
        """
        x = self.flatten(self.global_pool(x))
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        if pre_logits:
            return x
        logits = self.head(x)
        if self.head_dist is None:
            return logits
        distilled = self.head_dist(x)
        if self.distilled_training and self.training and not torch.jit.is_scripting():
            # TorchScript wants one type, and never gets here
            return logits, distilled  # type: ignore[return-value]
        return (logits + distilled) / 2

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """Choose what a model with two classifiers returns in training.

        Args:
            enable: The logits of both, else their mean.
        """
        self.distilled_training = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """Return the linear classifier, an Identity if there is none; both of a distilled model."""
        classifier: nn.Module = getattr(self.head, "l", self.head)
        return classifier if self.head_dist is None else (classifier, self.head_dist.l)

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier and its norm by fresh ones.

        Args:
            num_classes: Classes, 0 for none.
            global_pool: Pooling before it, "" for none; None keeps the current one.
        """
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        like = next(self.parameters())
        self._set_head(num_classes, pool, device=like.device, dtype=like.dtype)
        for module in (self.global_pool, self.flatten, self.head, self.head_dist):
            if module is not None:
                module.train(self.training)

    @torch.jit.ignore
    def rename_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring an official state dict to our names, both of its classifiers if there are two.

        Args:
            weights: Name -> tensor, unwrapped.
        """
        return rename(weights) if self.head_dist is not None else to_ours(weights)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters into layers, for layer-wise rates."""
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else blocks}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring an official or timm-style state dict to the names of `model`."""
    return convert_state_dict(state_dict, model, require_head=False)


_CLASSIFIERS = ("head.l", "head_dist.l")

default_cfgs = generate_cfgs(
    WEIGHTS, pool_size=(4, 4), first_conv="patch_embed.0.c", classifier="head.l"
)


def _create_shvit(variant: str, pretrained: bool, args: dict[str, Any], **kwargs: Any) -> SHViT:
    if kwargs.get("distilled"):
        overlay = {**(kwargs.get("pretrained_cfg_overlay") or {}), "classifier": _CLASSIFIERS}
        kwargs["pretrained_cfg_overlay"] = overlay
    return build_model(
        SHViT,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2), "flatten_sequential": True},
        **{**args, **kwargs},
    )


@register_model
def shvit_s1(pretrained: bool = False, **kwargs: Any) -> SHViT:
    """SHViT-S1: 6.3 M parameters, 0.24 GMACs at 224."""
    args = {"embed_dim": (128, 224, 320), "depth": (2, 4, 5), "partial_dim": (32, 48, 68)}
    return _create_shvit("shvit_s1", pretrained, args, **kwargs)


@register_model
def shvit_s2(pretrained: bool = False, **kwargs: Any) -> SHViT:
    """SHViT-S2: 11.5 M parameters, 0.37 GMACs at 224."""
    args = {"embed_dim": (128, 308, 448), "depth": (2, 4, 5), "partial_dim": (32, 66, 96)}
    return _create_shvit("shvit_s2", pretrained, args, **kwargs)


@register_model
def shvit_s3(pretrained: bool = False, **kwargs: Any) -> SHViT:
    """SHViT-S3: 14.2 M parameters, 0.60 GMACs at 224."""
    args = {"embed_dim": (192, 352, 448), "depth": (3, 5, 5), "partial_dim": (48, 75, 96)}
    return _create_shvit("shvit_s3", pretrained, args, **kwargs)


@register_model
def shvit_s4(pretrained: bool = False, **kwargs: Any) -> SHViT:
    """SHViT-S4: 16.6 M parameters, 0.99 GMACs at 256."""
    args = {"embed_dim": (224, 336, 448), "depth": (4, 7, 6), "partial_dim": (48, 72, 96)}
    return _create_shvit("shvit_s4", pretrained, args, **kwargs)
