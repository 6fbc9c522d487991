"""MaxViT: multi-axis vision transformer.

Paper: Tu et al., ECCV 2022, https://arxiv.org/abs/2204.01697
Official code and weights: https://github.com/google-research/maxvit (Apache-2.0, TensorFlow)

A convolutional stem, then four stages at strides 4 to 32. A block is an MBConv, attention within
windows and attention within a grid over the whole map, both with a feed forward network. Names with
`tf` are the official models, as ported by timm; those with `rw` were designed and trained by timm.
Parameter names are timm's.

Windows follow the image size that the model is made for (`img_size`, a 32nd of it) and not the
images: any size runs, on maps that the windows do not fill with the tokens outside hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    LayerNorm2d,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    to_2tuple,
)
from torch import Tensor, nn

from backbones.pretrained import convert_state_dict, unwrap
from backbones.pretrained.maxvit import WEIGHTS, to_ours

from ._backbone import HeadedBackbone, check_pool
from ._builder import build_model, generate_cfgs, record_input_size
from ._registry import register_model
from .layers import ConvStem, MultiAxisBlock, MultiAxisStage, ParallelMultiAxisBlock
from .layers.relative_position import Window

__all__ = ["MaxViT"]

_TABLE = ".relative_position_bias_table"


class MaxViT(HeadedBackbone):
    """MaxViT (arXiv 2204.01697): images `(B, in_chans, H, W)` of any size from 32x32 on.

    Equal to timm's model at every size that timm's accepts, which are those that the windows divide
    on the maps of all stages. On odd maps see `layers.MBConv`.

    Args:
        embed_dim: Widths of the stages, multiples of 32.
        depths: Blocks of each stage.
        stem_width: Widths of the two convolutions of the stem.
        style: "tf" for the architecture of the TensorFlow release; "rw" for that of timm's own
            models, which differs in widths, biases, padding, activations and eps; "rmlp" for "rw"
            with relative positions from an MLP.
        parallel: Attention in windows and in a grid side by side ("PM" blocks).
        init_values: First value of the LayerScales, None for none.
        head_hidden_size: Width of the hidden layer of the classifier; None for a linear classifier
            after a norm of the last map.
        img_size: Height and width of the images that the windows are made for.
        transformer_window_size: Rows and columns of a window; a fraction of `img_size` if None.
        transformer_grid_size: Those of a grid; the window's or a fraction of `img_size` if None.
        transformer_partition_ratio: `img_size` over the size of windows and grids.
        in_chans: Channels of the images.
        num_classes: Classes, 0 for no classifier.
        global_pool: Pooling before the classifier: "avg", "max", "avgmax", or "" for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Probability that training drops a branch of the last block; it rises from 0.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ValueError: An unknown style; windows without tokens; windows or LayerScales that parallel
            blocks cannot have; a pooling that changes the width.
    """

    def __init__(
        self,
        embed_dim: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 5, 2),
        stem_width: Sequence[int] = (64, 64),
        style: str = "tf",
        parallel: bool = False,
        init_values: float | None = None,
        head_hidden_size: int | None = None,
        img_size: int | Window = 224,
        transformer_window_size: int | Window | None = None,
        transformer_grid_size: int | Window | None = None,
        transformer_partition_ratio: int = 32,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_chans, num_classes, stem_feature=True)
        dd = {"device": device, "dtype": dtype}
        if style not in ("tf", "rw", "rmlp"):
            raise ValueError(f"style={style!r} is unknown: use 'tf', 'rw' or 'rmlp'")
        if parallel and init_values is not None:
            raise ValueError(f"init_values={init_values}: parallel blocks have no LayerScale")
        self.style, self.parallel, self.drop_rate = style, parallel, drop_rate
        self.img_size, self.partition_ratio = to_2tuple(img_size), transformer_partition_ratio
        window, grid = self._partition_sizes(
            self.img_size,
            transformer_partition_ratio,
            transformer_window_size,
            transformer_grid_size or transformer_window_size,
        )
        sizes: dict[str, Any] = {"window_size": window, "grid_size": grid}
        block: Callable[..., nn.Module] = partial(MultiAxisBlock, init_values=init_values, **sizes)
        if parallel:
            block = partial(ParallelMultiAxisBlock, partition_size=window)
        block = partial(block, style=style, **dd)
        self.stem = ConvStem(in_chans, stem_width, style == "tf", **dd)
        self.feature_info = [{"num_chs": stem_width[-1], "reduction": 2, "module": "stem"}]
        stages, in_dim = [], stem_width[-1]
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        for i, dim in enumerate(embed_dim):
            stages.append(MultiAxisStage(in_dim, dim, rates[i], block))
            self.feature_info.append(
                {"num_chs": dim, "reduction": 2 ** (i + 2), "module": f"stages.{i}"}
            )
            in_dim = dim
        self.stages = nn.Sequential(*stages)
        self._set_feature_norms()
        self.num_features = in_dim

        final_norm = partial(LayerNorm2d, eps=1e-5 if style == "tf" else 1e-6)
        self.norm = nn.Identity() if head_hidden_size else final_norm(in_dim, **dd)
        check_pool(global_pool)
        if head_hidden_size:
            self.head = NormMlpClassifierHead(
                in_dim, num_classes, head_hidden_size, global_pool, drop_rate, final_norm, **dd
            )
        else:
            self.head = ClassifierHead(in_dim, num_classes, global_pool, drop_rate, **dd)
        self.head_hidden_size = head_hidden_size or in_dim
        _init_weights(self)

    def _partition_sizes(
        self,
        img_size: Window,
        ratio: int,
        window_size: int | Window | None,
        grid_size: int | Window | None,
    ) -> tuple[Window, Window]:
        """Windows and grids, from `img_size` where they are None."""
        fraction = (img_size[0] // ratio, img_size[1] // ratio)
        window = fraction if window_size is None else to_2tuple(window_size)
        grid = fraction if grid_size is None else to_2tuple(grid_size)
        if min(*window, *grid) < 1:
            raise ValueError(
                f"windows of {window} and grids of {grid} are too small: use positive sizes, and "
                f"an img_size={img_size} of at least the partition ratio ({ratio})"
            )
        if self.parallel and window != grid:
            raise ValueError(
                f"windows of {window} and grids of {grid} differ: parallel blocks need one size"
            )
        return window, grid

    def forward_stem(self, x: Tensor) -> Tensor:
        """Embed images `(B, in_chans, H, W)` at half their size, rounded up."""
        return self.stem(x)

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: int | Window | None = None,
        window_size: int | Window | None = None,
        grid_size: int | Window | None = None,
        partition_ratio: int | None = None,
    ) -> None:
        """Make windows and grids for another image size; relative positions are interpolated.

        Without it the model takes images of other sizes too, with the windows it has.

        Args:
            img_size: Height and width in pixels; None keeps the size.
            window_size: Rows and columns of a window; a fraction of the image's if None.
            grid_size: Those of a grid, likewise.
            partition_ratio: Image size over the size of windows and grids; None keeps the ratio.

        Raises:
            ValueError: An image below 32 pixels, windows without tokens or that parallel blocks
                cannot have, a model whose tables `fuse()` has finished.
        """
        size = self.img_size if img_size is None else to_2tuple(img_size)
        super().set_input_size(size)
        ratio = self.partition_ratio if partition_ratio is None else partition_ratio
        window, grid = self._partition_sizes(size, ratio, window_size, grid_size)
        for module in self.modules():
            if isinstance(module, (MultiAxisBlock, ParallelMultiAxisBlock)):
                module.set_partition_size(window, grid)
        self.img_size, self.partition_ratio = size, ratio
        record_input_size(
            self,
            size,
            transformer_window_size=window,
            transformer_grid_size=grid,
            transformer_partition_ratio=ratio,
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters of relative positions."""
        return {name for name, _ in self.named_parameters() if ".rel_pos." in name}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters into layers, for layer-wise rates."""
        return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))]}


def _init_weights(model: MaxViT) -> None:
    """First values of all but the classifier: as EfficientNet's and ViT's (timm's "vit_eff")."""
    for name, module in model.named_modules():
        if name.startswith("head"):
            continue
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.normal_(module.bias, std=1e-6 if ".mlp." in name else 0.0)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring an official or timm-style state dict to the names and windows of `model`.

    Relative position tables of other windows are interpolated.
    """
    weights, modules = to_ours(unwrap(state_dict)), dict(model.named_modules())
    for name, value in weights.items():
        fit = getattr(modules.get(name.removesuffix(_TABLE)), "fit", None)
        if name.endswith(_TABLE) and fit is not None:
            weights[name] = fit(value)
    return convert_state_dict(weights, model, require_head=False)


default_cfgs = generate_cfgs(
    WEIGHTS, first_conv="stem.conv1", classifier="head.fc", fixed_input_size=True
)


def _create_maxvit(variant: str, pretrained: bool, args: dict[str, Any], **kwargs: Any) -> MaxViT:
    return build_model(
        MaxViT,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True},
        **{**args, **kwargs},
    )


def _sizes(
    embed_dim: tuple[int, ...], depths: tuple[int, ...], stem: tuple[int, int], **kwargs: Any
) -> dict[str, Any]:
    return {"embed_dim": embed_dim, "depths": depths, "stem_width": stem, **kwargs}


_DEPTHS, _DEEP = (2, 2, 5, 2), (2, 6, 14, 2)
_TINY, _SMALL = (64, 128, 256, 512), (96, 192, 384, 768)

_TINY_TF = _sizes(_TINY, _DEPTHS, (64, 64), head_hidden_size=512)
_SMALL_TF = _sizes(_SMALL, _DEPTHS, (64, 64), head_hidden_size=768)
_BASE_TF = _sizes(_SMALL, _DEEP, (64, 64), head_hidden_size=768)
_LARGE_TF = _sizes((128, 256, 512, 1024), _DEEP, (128, 128), head_hidden_size=1024)
_XLARGE_TF = _sizes((192, 384, 768, 1536), _DEEP, (192, 192), head_hidden_size=1536)
_PICO_RW = _sizes((32, 64, 128, 256), _DEPTHS, (24, 32), style="rw")
_NANO_RW = _sizes(_TINY, (1, 2, 3, 1), (32, 64), style="rw")
_TINY_RW = _sizes(_TINY, _DEPTHS, (32, 64), style="rw")
_TINY_PM = {**_TINY_RW, "parallel": True}
_PICO_RMLP, _NANO_RMLP, _TINY_RMLP = (
    {**a, "style": "rmlp"} for a in (_PICO_RW, _NANO_RW, _TINY_RW)
)
_SMALL_RMLP = _sizes(_SMALL, _DEPTHS, (32, 64), style="rmlp", init_values=1e-6)
_BASE_RMLP = _sizes(_SMALL, _DEEP, (32, 64), style="rmlp", head_hidden_size=768)


@register_model
def maxvit_tiny_tf_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-T at 224: 30.9 M parameters, 5.55 GMACs."""
    return _create_maxvit("maxvit_tiny_tf_224", pretrained, _TINY_TF, **kwargs)


@register_model
def maxvit_tiny_tf_384(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-T at 384: 31.0 M parameters, 17.30 GMACs."""
    return _create_maxvit("maxvit_tiny_tf_384", pretrained, _TINY_TF, **kwargs)


@register_model
def maxvit_tiny_tf_512(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-T at 512: 31.0 M parameters, 32.87 GMACs."""
    return _create_maxvit("maxvit_tiny_tf_512", pretrained, _TINY_TF, **kwargs)


@register_model
def maxvit_small_tf_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-S at 224: 68.9 M parameters, 11.58 GMACs."""
    return _create_maxvit("maxvit_small_tf_224", pretrained, _SMALL_TF, **kwargs)


@register_model
def maxvit_small_tf_384(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-S at 384: 69.0 M parameters, 35.53 GMACs."""
    return _create_maxvit("maxvit_small_tf_384", pretrained, _SMALL_TF, **kwargs)


@register_model
def maxvit_small_tf_512(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-S at 512: 69.1 M parameters, 66.34 GMACs."""
    return _create_maxvit("maxvit_small_tf_512", pretrained, _SMALL_TF, **kwargs)


@register_model
def maxvit_base_tf_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-B at 224: 119.5 M parameters, 23.90 GMACs."""
    return _create_maxvit("maxvit_base_tf_224", pretrained, _BASE_TF, **kwargs)


@register_model
def maxvit_base_tf_384(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-B at 384: 119.7 M parameters, 73.17 GMACs."""
    return _create_maxvit("maxvit_base_tf_384", pretrained, _BASE_TF, **kwargs)


@register_model
def maxvit_base_tf_512(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-B at 512: 119.9 M parameters, 136.2 GMACs."""
    return _create_maxvit("maxvit_base_tf_512", pretrained, _BASE_TF, **kwargs)


@register_model
def maxvit_large_tf_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-L at 224: 211.8 M parameters, 43.50 GMACs."""
    return _create_maxvit("maxvit_large_tf_224", pretrained, _LARGE_TF, **kwargs)


@register_model
def maxvit_large_tf_384(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-L at 384: 212.0 M parameters, 131.7 GMACs."""
    return _create_maxvit("maxvit_large_tf_384", pretrained, _LARGE_TF, **kwargs)


@register_model
def maxvit_large_tf_512(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-L at 512: 212.3 M parameters, 242.4 GMACs."""
    return _create_maxvit("maxvit_large_tf_512", pretrained, _LARGE_TF, **kwargs)


@register_model
def maxvit_xlarge_tf_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-XL at 224: 475.0 M parameters, 97.22 GMACs with 1000 classes."""
    return _create_maxvit("maxvit_xlarge_tf_224", pretrained, _XLARGE_TF, **kwargs)


@register_model
def maxvit_xlarge_tf_384(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-XL at 384: 475.3 M parameters, 291.5 GMACs."""
    return _create_maxvit("maxvit_xlarge_tf_384", pretrained, _XLARGE_TF, **kwargs)


@register_model
def maxvit_xlarge_tf_512(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-XL at 512: 475.8 M parameters, 530.6 GMACs."""
    return _create_maxvit("maxvit_xlarge_tf_512", pretrained, _XLARGE_TF, **kwargs)


@register_model
def maxvit_pico_rw_256(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT, timm's pico, at 256: 7.5 M parameters, 1.80 GMACs."""
    return _create_maxvit("maxvit_pico_rw_256", pretrained, _PICO_RW, **kwargs)


@register_model
def maxvit_nano_rw_256(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT, timm's nano, at 256: 15.5 M parameters, 4.42 GMACs."""
    return _create_maxvit("maxvit_nano_rw_256", pretrained, _NANO_RW, **kwargs)


@register_model
def maxvit_tiny_rw_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT, timm's tiny, at 224: 29.1 M parameters, 5.07 GMACs."""
    return _create_maxvit("maxvit_tiny_rw_224", pretrained, _TINY_RW, **kwargs)


@register_model
def maxvit_tiny_rw_256(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT, timm's tiny, at 256: 29.1 M parameters, 6.69 GMACs."""
    return _create_maxvit("maxvit_tiny_rw_256", pretrained, _TINY_RW, **kwargs)


@register_model
def maxvit_tiny_pm_256(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT, timm's tiny, parallel, at 256: 30.1 M parameters, 6.55 GMACs."""
    return _create_maxvit("maxvit_tiny_pm_256", pretrained, _TINY_PM, **kwargs)


@register_model
def maxvit_rmlp_pico_rw_256(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT, timm's pico, positions by an MLP, at 256: 7.5 M parameters, 1.82 GMACs."""
    return _create_maxvit("maxvit_rmlp_pico_rw_256", pretrained, _PICO_RMLP, **kwargs)


@register_model
def maxvit_rmlp_nano_rw_256(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT, timm's nano, positions by an MLP, at 256: 15.5 M parameters, 4.43 GMACs."""
    return _create_maxvit("maxvit_rmlp_nano_rw_256", pretrained, _NANO_RMLP, **kwargs)


@register_model
def maxvit_rmlp_tiny_rw_256(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT, timm's tiny, positions by an MLP, at 256: 29.1 M parameters, 6.71 GMACs."""
    return _create_maxvit("maxvit_rmlp_tiny_rw_256", pretrained, _TINY_RMLP, **kwargs)


@register_model
def maxvit_rmlp_small_rw_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT, timm's small, positions by an MLP, at 224: 64.9 M parameters, 10.69 GMACs."""
    return _create_maxvit("maxvit_rmlp_small_rw_224", pretrained, _SMALL_RMLP, **kwargs)


@register_model
def maxvit_rmlp_small_rw_256(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT, timm's small, positions by an MLP, at 256: 64.9 M parameters, 14.07 GMACs."""
    return _create_maxvit("maxvit_rmlp_small_rw_256", pretrained, _SMALL_RMLP, **kwargs)


@register_model
def maxvit_rmlp_base_rw_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT, timm's base, positions by an MLP, at 224: 116.1 M parameters, 23.04 GMACs."""
    return _create_maxvit("maxvit_rmlp_base_rw_224", pretrained, _BASE_RMLP, **kwargs)


@register_model
def maxvit_rmlp_base_rw_384(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT, timm's base, positions by an MLP, at 384: 116.1 M parameters, 70.65 GMACs."""
    return _create_maxvit("maxvit_rmlp_base_rw_384", pretrained, _BASE_RMLP, **kwargs)
