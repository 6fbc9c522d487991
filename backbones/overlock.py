"""OverLoCK: an overview first, then a closer look with context-mixing dynamic kernels.

Paper: Lou and Yu, CVPR 2025, https://arxiv.org/abs/2502.20087
Official code and weights: https://github.com/LMMMEng/OverLoCK (Apache-2.0)

A base network of three stages, at strides 4 to 16, feeds two others: the overview, a small network
at stride 32 that gives a prior of what the image shows, and the focus, two stages at strides 16 and
32 that carry this prior along as a context and generate dynamic kernels from it.

Nothing depends on the image size. Where a map of the focus has a side shorter than its large
kernel, which is so for images with a side below 193, it is resized for the mixing, as in the
official code.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import ClassifierHead, LayerNorm2d, calculate_drop_path_rates
from timm.models import PretrainedCfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from backbones.pretrained import WeightsError, convert_state_dict
from backbones.pretrained.overlock import WEIGHTS

from ._backbone import HeadedBackbone, check_pool, check_pyramid, init_truncated
from ._builder import build_model, generate_cfgs
from ._registry import register_model
from .layers import DilatedReparamConv, ProjectionHead
from .layers.focus_stage import FocusStage
from .layers.large_kernel import merge_weights
from .layers.overview import AuxiliaryHead, OverviewSkip
from .layers.rep_conv_block import rep_conv_stage, rep_conv_stem

__all__ = ["OverLoCK"]

# of the base stages, the overview, and the focus stages
_KERNELS = (17, 15, 13, 7, 13, 7)
_SMALL_KERNEL = 5
_BASE_STAGES = 3
_FEATURES = ("stages.0", "stages.1", "focus.0", "focus.1")
_PYRAMIDS = ("", "det", "seg")
_PYRAMID_LAYERS = ("feature_norms.", "overview_skip.")


class OverLoCK(HeadedBackbone):
    """OverLoCK (arXiv 2502.20087): images `(B, in_chans, H, W)` of any size from 32x32 on.

    Models have two forms. They train with smaller kernels and norms beside every large kernel;
    `reparameterize()` merges each set into one convolution, which changes outputs by rounding only.
    With `reparam` they are built so, for weights of that form; weights of the first form are merged
    on the way in. The merged form can be trained too, at a lower cost; the authors found it
    slightly worse for fine-tuning. `fuse()` merges the kernels and folds norms and shifts besides.

    There are four features: of the first two stages of the base network, and of both stages of the
    focus, with the channels of the context behind those of the map. `pyramid` makes them those of
    the official backbones of detection and segmentation, for their weights and to train others:
    features have a LayerNorm each, and that of the second is in line, so all that follows differs
    from the classifier's. With "det", the overview is added to the last feature too. Pyramids are
    for `features_only` and `forward_intermediates`; they have no classifier, whatever
    `num_classes` is.

    Args:
        dims: Widths of the base stages and of the overview; those of the focus are the last two.
        depths: Blocks of the base stages and of the overview.
        focus_depths: Blocks of the focus stages.
        num_heads: Heads of the dynamic mixing, for each focus stage; twice the official numbers,
            which count both kernels of a head as one.
        head_hidden_size: Width of the projection before the classifier.
        reparam: Build the merged form.
        aux_head: Add a classifier of the overview. In training, the model then returns
            `{"main": logits, "aux": logits}`.
        pyramid: "det" or "seg", see above; "" for none.
        in_chans: Channels of the images.
        num_classes: Classes, 0 for no classifier.
        global_pool: Pooling before the classifier: "avg", "max", "avgmax", or "" for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Probability that training drops a branch of the last block; it rises from 0
            over base, overview and focus.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ValueError: Stages that do not fit together; an unknown pyramid; a pooling that changes the
            width.
    """

    # torch.jit.script stumbles over annotations of a module class
    if TYPE_CHECKING:
        overview: nn.Module
        context_proj: nn.Module
        aux_head: AuxiliaryHead | None
        overview_skip: OverviewSkip | None

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (4, 4, 6, 2),
        focus_depths: Sequence[int] = (12, 2),
        num_heads: Sequence[int] = (8, 16),
        head_hidden_size: int = 1024,
        reparam: bool = False,
        aux_head: bool = False,
        pyramid: str = "",
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_pyramid(pyramid, _PYRAMIDS)
        _check_stages(dims, depths, focus_depths, num_heads)
        check_pool(global_pool)
        super().__init__(in_chans, 0 if pyramid else num_classes)
        dd = {"device": device, "dtype": dtype}
        self.drop_rate, self.reparam = drop_rate, reparam
        context_dim = dims[3] // 4
        rates = calculate_drop_path_rates(drop_path_rate, [*depths, *focus_depths], stagewise=True)
        self.stem = rep_conv_stem(in_chans, dims[0], **dd)
        befores = (None, *dims)
        stages = [
            rep_conv_stage(befores[i], dims[i], _KERNELS[i], i > 1, rates[i], reparam, **dd)
            for i in range(4)
        ]
        self.stages = nn.Sequential(*stages[:_BASE_STAGES])
        self.overview = stages[_BASE_STAGES]
        self.context_proj = nn.Linear(dims[3], context_dim, **dd)
        self.focus = nn.ModuleList(
            FocusStage(
                dims[2] if i else None, dims[2 + i], context_dim, _KERNELS[4 + i], _SMALL_KERNEL,
                num_heads[i], rates[4 + i], reparam, **dd,
            )
            for i in range(2)
        )  # fmt: skip
        self.norm = nn.Identity()
        widths = (dims[0], dims[1], dims[2] + context_dim, dims[3] + context_dim)
        self.num_features, self.head_hidden_size = widths[3], head_hidden_size
        self.feature_info = [
            {"num_chs": width, "reduction": 2 ** (i + 2), "module": _FEATURES[i]}
            for i, width in enumerate(widths)
        ]
        self._set_feature_norms(partial(LayerNorm2d, eps=1e-6, **dd) if pyramid else None)
        self.overview_skip = OverviewSkip(dims[3], widths[3], **dd) if pyramid == "det" else None
        self.aux_head = None
        if pyramid:
            self.head = ClassifierHead(widths[3], 0, global_pool, drop_rate, **dd)
            self.head_hidden_size = self.num_features
        else:
            self.head = ProjectionHead(
                widths[3], num_classes, head_hidden_size, global_pool, drop_rate, bias=False, **dd
            )
            self.aux_head = AuxiliaryHead(dims[3], num_classes, **dd) if aux_head else None
        self.apply(init_truncated)

    def forward_stem(self, x: Tensor) -> Tensor:
        """Embed images `(B, in_chans, H, W)` at a quarter of their size, rounded up."""
        return self.stem(x)

    def _run(self, x: Tensor, keep: list[int], end: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Compute features up to number `end`: the last map, the overview, the features to keep."""
        x = self.forward_stem(self.image_input(x))
        maps: list[Tensor] = []
        for index, stage in enumerate(self.stages):
            if index <= end:
                x = stage(x)
                if index == 1:
                    x = self.feature_norms[1](x)
                # the third of these stages is no feature
                if index < 2 and index in keep:
                    maps.append(self.feature_norms[0](x) if index == 0 else x)
        if end < 2:
            return x, x, maps
        overview = self.overview(x)
        prior = self.context_proj(overview.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for index, stage in enumerate(self.focus, 2):
            if index <= end:
                x = stage(x, prior)
                if index in keep:
                    maps.append(self._finish(x, overview, index))
        return x, overview, maps

    def _finish(self, x: Tensor, overview: Tensor, index: int) -> Tensor:
        """What a pyramid does to the map of a focus stage."""
        if index == 2:
            return self.feature_norms[2](x)
        x = self.feature_norms[3](x)
        return x if self.overview_skip is None else self.overview_skip(overview, x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last map `(B, num_features, H / 32, W / 32)`, without a pyramid's norm."""
        keep: list[int] = []
        return self._run(x, keep, 3)[0]

    def forward(self, x: Tensor) -> Any:
        """Classify images.

        Args:
            x: Images `(B, in_chans, H, W)`.

        Returns:
            Logits `(B, num_classes)`; with an auxiliary head, in training,
            `{"main": logits, "aux": logits}`.
        """
        keep: list[int] = []
        x, overview, _ = self._run(x, keep, 3)
        logits = self.forward_head(x)
        if torch.jit.is_scripting():
            return logits
        else:
            if self.aux_head is None or not self.training:
                return logits
            return {"main": logits, "aux": self.aux_head(overview)}

    def _count_features(self) -> int:
        return 2 + len(self.focus) if len(self.focus) > 0 else len(self.stages)

    def _forward_until(
        self, x: Tensor, taken: list[int], end: int, norm: bool
    ) -> tuple[Tensor, list[Tensor]]:
        x, _, maps = self._run(x, taken, end)
        return x, maps

    @torch.jit.ignore
    def feature_layers(self) -> list[list[nn.Module]]:
        """Layers in the order of the network: those of the stem, then those of each feature.

        The third are the last base stage, the overview, its context and the first focus stage.
        """
        base = [[self.image_input, self.stem], *([stage] for stage in self.stages[:2])]
        focus: list[list[nn.Module]] = [[stage] for stage in self.focus]
        if focus:
            focus[0] = [self.stages[2], self.overview, self.context_proj, *focus[0]]
        return base + focus

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of the features in `indices`, in place.

        Args:
            indices: Features to keep, as in `forward_intermediates`.
            prune_norm: Without effect: there is no norm after the last stage.
            prune_head: Drop pooling and classifiers too; they always go when a stage goes.

        Returns:
            The chosen features as non-negative indices.
        """
        count = self._count_features()
        taken, last = feature_take_indices(count, indices)
        if last < 2:
            self.stages = self.stages[: last + 1]
            self.overview, self.context_proj = nn.Identity(), nn.Identity()
        self.focus = self.focus[: max(last - 1, 0)]
        for level in range(4):
            # that of the second feature is in line
            if level > last or (level not in taken and level != 1):
                self.feature_norms[level] = nn.Identity()
        if last < count - 1:
            self.overview_skip = None
            self.num_features = self.head_hidden_size = int(self.feature_info[last]["num_chs"])
        if last < count - 1 or prune_head:
            self._remove_head()
        return taken

    def _remove_head(self) -> None:
        super()._remove_head()
        self.aux_head = None

    @torch.jit.ignore
    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, reset_other: bool = False
    ) -> None:
        """Replace the classifier by a fresh one, and that of the overview.

        Args:
            num_classes: Classes, 0 for none.
            global_pool: Pooling before it, "" for none; None keeps the current one.
            reset_other: Drop the hidden layer of the head too.
        """
        super().reset_classifier(num_classes, global_pool, reset_other)
        if self.aux_head is not None:
            like = next(self.parameters())
            self.aux_head.reset(num_classes)
            self.aux_head.to(like.device, like.dtype).train(self.training)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of every stage in the backward pass instead of storing them."""
        super().set_grad_checkpointing(enable)
        for stage in (self.overview, *self.focus):
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters into layers, for layer-wise rates."""
        if coarse:
            base, focus = r"^stages\.(\d+)", r"^focus\.(\d+)"
            overview = r"^(?:overview|context_proj)"
            return {"stem": r"^stem", "base": base, "overview": overview, "focus": focus}
        return {
            "stem": r"^stem",
            "base": [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            ],
            "overview": [
                (r"^overview\.downsample", (0,)),
                (r"^overview\.blocks\.(\d+)", None),
                (r"^context_proj", (99999,)),
            ],
            "focus": [
                (r"^focus\.(\d+)\.(?:context_)?downsample", (0,)),
                (r"^focus\.(\d+)\.blocks\.(\d+)", None),
                (r"^(?:feature_norms|overview_skip)", (99999,)),
            ],
        }

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that need no weight decay beyond the usual norms and biases.

        None. The official recipe decays tables of relative positions, scales and global response
        norms too, as tensors of more than one dimension; here the latter two are vectors, which
        timm's optimizers leave out.
        """
        return set()

    @torch.no_grad()
    def reparameterize(self) -> "OverLoCK":
        """Merge every large kernel with the smaller ones beside it, in place, in any type.

        The model can still be trained; load weights of the other form before. Outputs in eval mode
        change by rounding only.

        Returns:
            The model.
        """
        for layer in self.modules():
            if isinstance(layer, DilatedReparamConv):
                layer.reparameterize()
        self.reparam = True
        # where timm's save_for_hf looks for what a model was built with
        self._model_args = {**getattr(self, "_model_args", {}), "reparam": True}
        return self

    @torch.no_grad()
    def fuse(self) -> "OverLoCK":
        """Fold what is exact for inference, in place; see `Backbone.fuse`."""
        self.reparameterize()
        super().fuse()
        return self

    @torch.jit.ignore
    def adapt_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring weights under our names to the form of this model.

        Kernels are merged where the model is re-parameterised; the auxiliary head goes where it has
        none; weights without the layers of a pyramid get those of the model.

        Raises:
            WeightsError: Merged weights, or those of a pyramid, for a model that is not.
        """
        given = dict(weights)
        own = {k: v for k, v in self.state_dict().items() if k.startswith(_PYRAMID_LAYERS)}
        if self.aux_head is None:
            given = {k: v for k, v in given.items() if not k.startswith("aux_head.")}
        of_pyramid = any(name.startswith(_PYRAMID_LAYERS) for name in given)
        if of_pyramid and not own:
            raise WeightsError(
                "the weights are of a pyramid: create the model with pyramid='det' or 'seg'"
            )
        if not self.reparam and any(name.endswith(".rep.conv.bias") for name in given):
            raise WeightsError(
                "the weights are of the re-parameterised form: create the model with reparam=True"
            )
        for name, layer in self.named_modules():
            if self.reparam and isinstance(layer, DilatedReparamConv):
                merge_weights(given, f"{name}.")
        return given if of_pyramid else {**given, **own}


def _check_stages(
    dims: Sequence[int], depths: Sequence[int], focus_depths: Sequence[int], heads: Sequence[int]
) -> None:
    if (len(dims), len(depths), len(focus_depths), len(heads)) != (4, 4, 2, 2):
        raise ValueError(
            f"dims={dims} and depths={depths} must have four numbers, focus_depths={focus_depths} "
            f"and num_heads={heads} two"
        )
    for dim, count in zip(dims[2:], heads, strict=True):
        if count < 1 or dim % (2 * count):
            raise ValueError(
                f"dims={dims}: the last two must be multiples of 2 * num_heads={heads}"
            )
    if dims[0] % 2 or dims[3] % 4:
        raise ValueError(f"dims={dims}: the first must be even, the last a multiple of 4")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring an official state dict to the names and the form of `model`."""
    return convert_state_dict(state_dict, model, require_head=False)


default_cfgs = generate_cfgs(
    WEIGHTS, pool_size=(7, 7), first_conv="stem.0.conv", classifier="head.fc"
)


def _is_reparam(cfg: str | dict[str, Any] | PretrainedCfg | None) -> bool:
    """Whether a tag, or a configuration of weights, is of the merged form."""
    if isinstance(cfg, dict):
        cfg = cfg.get("tag")
    tag = cfg.tag if isinstance(cfg, PretrainedCfg) else cfg
    return (tag or "").startswith("reparam")


def _create_overlock(
    variant: str, pretrained: bool, args: dict[str, Any], **kwargs: Any
) -> OverLoCK:
    reparam = _is_reparam(kwargs.get("pretrained_cfg"))
    if kwargs.get("aux_head"):
        # weights without it, or of other classes, leave it fresh
        overlay = {"classifier": ("head.fc", "aux_head.fc")}
        kwargs["pretrained_cfg_overlay"] = {
            **(kwargs.get("pretrained_cfg_overlay") or {}),
            **overlay,
        }
    return build_model(
        OverLoCK,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{"reparam": reparam, **args, **kwargs},
    )


@register_model
def overlock_xt(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-XT: 16.5 M parameters, 2.64 GMACs at 224 when re-parameterised."""
    args = {
        "dims": (56, 112, 256, 336),
        "depths": (2, 2, 3, 2),
        "focus_depths": (6, 2),
        "num_heads": (8, 12),
    }
    return _create_overlock("overlock_xt", pretrained, args, **kwargs)


@register_model
def overlock_t(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-T: 33.5 M parameters, 5.52 GMACs at 224 when re-parameterised."""
    return _create_overlock("overlock_t", pretrained, {}, **kwargs)


@register_model
def overlock_s(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-S: 56.2 M parameters, 9.50 GMACs at 224 when re-parameterised."""
    args = {
        "dims": (64, 128, 320, 512),
        "depths": (6, 6, 8, 3),
        "focus_depths": (16, 3),
        "num_heads": (16, 32),
    }
    return _create_overlock("overlock_s", pretrained, args, **kwargs)


@register_model
def overlock_b(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-B: 94.9 M parameters, 16.78 GMACs at 224 when re-parameterised."""
    args = {
        "dims": (80, 160, 384, 576),
        "depths": (8, 8, 10, 4),
        "focus_depths": (20, 4),
        "num_heads": (12, 18),
    }
    return _create_overlock("overlock_b", pretrained, args, **kwargs)
