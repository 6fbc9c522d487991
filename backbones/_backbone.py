"""What every family shares: input check, stages, intermediate features, pruning."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from timm.layers import (
    ClassifierHead,
    NormMlpClassifierHead,
    SelectAdaptivePool2d,
    to_2tuple,
    trunc_normal_,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from backbones.pretrained import WeightsError

from .layers.projection_head import ProjectionHead

MIN_SIZE = 32


@torch.fx.wrap
def check_image(x: Tensor, in_chans: int, min_size: int = MIN_SIZE) -> Tensor:
    """Return images `x` `(B, in_chans, H, W)`, `H, W >= min_size`, or raise ValueError."""
    # a trace sees sizes as tensors, and would keep nothing of the check but warnings
    if torch.jit.is_tracing():
        return x
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(
            f"images of shape {list(x.shape)} do not fit a model for (B, {in_chans}, H, W): "
            f"create it with in_chans= the channels of the images"
        )
    if x.shape[2] < min_size or x.shape[3] < min_size:
        raise ValueError(
            f"images of {x.shape[2]}x{x.shape[3]} are too small: resize them to {min_size} or more"
        )
    return x


class ImageInput(nn.Module):
    """Check a batch of images and bring it to the channels-last layout of all that follows.

    A child of the model, the first one, so that timm's feature extractors run it too.

    Args:
        in_chans: Channels of the images.
    """

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self.in_chans = in_chans

    def forward(self, x: Tensor) -> Tensor:
        """Take and return images `(B, in_chans, H, W)`."""
        return check_image(x, self.in_chans).contiguous(memory_format=torch.channels_last)

    def extra_repr(self) -> str:
        """Show the channels when the model is printed."""
        return f"in_chans={self.in_chans}"


class Backbone(nn.Module):
    """A hierarchy of stages after a stem: timm's model interface, once for all families.

    A family sets `stages`, `norm` (what follows the last stage, an Identity if nothing does),
    `feature_info` (one entry per stage, after one of the stem if that is a feature too),
    `num_features` and `head_hidden_size`, calls `_set_feature_norms` after these, and defines
    `forward_stem`, `forward_head`, `get_classifier`, `reset_classifier` and `group_matcher`.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the classifier, 0 for none.
        stem_feature: Count the map of the stem among the features, as the first.
    """

    # torch.jit.script stumbles over annotations of a module class
    if TYPE_CHECKING:
        stages: nn.Sequential
        feature_norms: nn.ModuleList
        norm: nn.Module
        feature_info: list[dict[str, str | int]]
        num_features: int
        head_hidden_size: int

    def __init__(self, in_chans: int, num_classes: int, stem_feature: bool = False) -> None:
        super().__init__()
        if in_chans < 1 or num_classes < 0:
            raise ValueError(
                f"in_chans={in_chans} must be positive and num_classes={num_classes} not negative"
            )
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_stem_features = int(stem_feature)
        self.image_input = ImageInput(in_chans)

    def _set_feature_norms(self, norm: Callable[[int], nn.Module] | None = None) -> None:
        """Give the map of every stage a norm where it is taken, as official detectors have them.

        What follows does not see these norms. They are no links of the chain of layers, so they
        come after the stages.

        Args:
            norm: Makes the norm of a width; None for no norms.
        """
        stages = self.feature_info[self.num_stem_features :]
        self.feature_norms = nn.ModuleList(
            nn.Identity() if norm is None else norm(int(info["num_chs"])) for info in stages
        )
        if norm is not None:
            for index, info in enumerate(stages):
                info["module"] = f"feature_norms.{index}"

    def forward_stem(self, x: Tensor) -> Tensor:
        """Embed images `(B, in_chans, H, W)` as the map that the first stage takes."""
        raise NotImplementedError(f"{type(self).__name__} must define forward_stem")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify the map of the last stage; `pre_logits` stops before the classifier."""
        raise NotImplementedError(f"{type(self).__name__} must define forward_head")

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last map `(B, num_features, H / stride, W / stride)` of images."""
        return self.norm(self.stages(self.forward_stem(self.image_input(x))))

    def forward(self, x: Tensor) -> Tensor:
        """Classify images `(B, in_chans, H, W)`: logits `(B, num_classes)`."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute chosen features: the maps after the stages, and after the stem if it counts.

        Args:
            x: Images `(B, in_chans, H, W)`.
            indices: Features to take, negative ones from the end; the last n if an int; all if
                None.
            norm: Apply the norm that follows the last stage, if there is one, to the map taken
                there.
            stop_early: Leave out the stages after the last one taken.
            output_fmt: Only "NCHW".
            intermediates_only: Return the maps without the final one.

        Returns:
            The final map and the list of maps taken, or only the list.

        Raises:
            ValueError: Another `output_fmt`.
            AssertionError: An index out of range.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt '{output_fmt}' is not available: use 'NCHW'")
        count = self._count_features()
        taken, last = feature_take_indices(count, indices)
        x, maps = self._forward_until(x, taken, last if stop_early else count - 1, norm)
        if intermediates_only:
            return maps
        return x, maps

    def _count_features(self) -> int:
        return self.num_stem_features + len(self.stages)

    def _forward_until(
        self, x: Tensor, taken: list[int], end: int, norm: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute features up to number `end`: the last map, and those of the numbers `taken`."""
        first, last = self.num_stem_features, self._count_features() - 1
        maps: list[Tensor] = []
        x = self.forward_stem(self.image_input(x))
        if first > 0 and 0 in taken:
            maps.append(x)
        # TorchScript knows no zip(strict=)
        for index, (stage, feature_norm) in enumerate(zip(self.stages, self.feature_norms)):  # noqa: B905
            level = first + index
            if level <= end:
                x = stage(x)
                if level in taken:
                    y = feature_norm(x)
                    maps.append(self.norm(y) if norm and level == last else y)
        return self.norm(x) if end == last else x, maps

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of the features in `indices`, in place.

        Features that are not chosen lose their norms, if they have any.

        Args:
            indices: Features to keep, as in `forward_intermediates`.
            prune_norm: Drop the norm after the last stage too; it always goes when a stage goes.
            prune_head: Drop pooling and classifier too; they always go when a stage goes.

        Returns:
            The chosen features as non-negative indices.
        """
        first = self.num_stem_features
        taken, last = feature_take_indices(first + len(self.stages), indices)
        shortened = last < first + len(self.stages) - 1
        self.stages = self.stages[: last + 1 - first]
        self.feature_norms = nn.ModuleList(
            norm if first + index in taken else nn.Identity()
            for index, norm in enumerate(self.feature_norms[: last + 1 - first])
        )
        if shortened or prune_norm:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.head_hidden_size = int(self.feature_info[last]["num_chs"])
        if shortened or prune_head:
            self._remove_head()
        return taken

    def _remove_head(self) -> None:
        self.reset_classifier(0, "")

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one.

        Args:
            num_classes: Its classes, 0 for none.
            global_pool: Pooling before it, "" for none; None keeps the current one.
        """
        raise NotImplementedError(f"{type(self).__name__} must define reset_classifier")

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Accept a new image size; models without size-bound parameters have nothing to change.

        Args:
            img_size: Height and width in pixels, one number for both.

        Raises:
            ValueError: A side below 32.
        """
        height, width = to_2tuple(img_size)
        if min(height, width) < MIN_SIZE:
            raise ValueError(f"img_size={img_size} is too small: use {MIN_SIZE} or more")

    @torch.jit.ignore
    def feature_layers(self) -> list[list[nn.Module]]:
        """Layers in the order of the network: those of the stem, then those that each stage adds.

        Norms of features, and what follows the last stage, are not among them.
        """
        children = list(self.children())
        stem = children[: children.index(self.stages)]
        return [stem, *([stage] for stage in self.stages)]

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of every stage in the backward pass instead of storing them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that need no weight decay beyond the usual norms and biases."""
        return set()

    @torch.no_grad()
    def fuse(self) -> "Backbone":
        """Fold what is exact for inference, BatchNorm into its convolution first of all, in place.

        Statistics become weights, so the model can no longer be trained and its state dict changes:
        load weights before. Outputs change by rounding only.

        Returns:
            The model.
        """
        _fuse_children(self)
        return self


class HeadedBackbone(Backbone):
    """A backbone with one of timm's classifier heads.

    A family sets `head`, a `ClassifierHead`, `NormMlpClassifierHead` or `ProjectionHead`, and
    `drop_rate`, its dropout, besides what `Backbone` asks for.
    """

    if TYPE_CHECKING:
        head: ClassifierHead | NormMlpClassifierHead | ProjectionHead
        drop_rate: float

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map `(B, num_features, H, W)` and classify it.

        Args:
            x: The map of the last stage, after the norm if there is one.
            pre_logits: Return what the last linear layer takes, `(B, head_hidden_size)`, instead.

        Returns:
            Logits `(B, num_classes)`.
        """
        return self.head(x, pre_logits=pre_logits)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the linear classifier, an Identity if there is none."""
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, reset_other: bool = False
    ) -> None:
        """Replace the classifier by a fresh one.

        Args:
            num_classes: Classes, 0 for none.
            global_pool: Pooling before it, "" for none; None keeps the current one.
            reset_other: Drop norm and hidden layer of the head too, if it has them.
        """
        pool = self.head.global_pool.pool_type if global_pool is None else global_pool
        check_pool(pool)
        like = next(self.parameters())
        dd: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        if isinstance(self.head, (NormMlpClassifierHead, ProjectionHead)) and not reset_other:
            self.head.reset(num_classes, pool)
            self.head.to(**dd)
        else:
            self.head = ClassifierHead(self.num_features, num_classes, pool, self.drop_rate, **dd)
            self.head_hidden_size = self.num_features
        self.head.train(self.training)
        self.num_classes = num_classes

    def _remove_head(self) -> None:
        self.reset_classifier(0, "", reset_other=True)

    @torch.jit.ignore
    def adapt_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring weights under our names to the form of this model.

        A pyramid leaves out the norm before the classifier, and keeps the norms of its features
        where the weights have none. Other models leave the norms of features out.

        Raises:
            WeightsError: Weights of a pyramid, without a norm before the classifier, for a model
                that has one.
        """
        names = self.state_dict()
        own = {k: v for k, v in names.items() if k.startswith("feature_norms.")}
        norms = {k: v for k, v in weights.items() if k.startswith("feature_norms.")}
        given = {k: v for k, v in weights.items() if k not in norms}
        if own:
            given = {k: v for k, v in given.items() if not k.startswith("norm.")}
            return {**given, **(norms or own)}
        if norms and any(k.startswith("norm.") and k not in given for k in names):
            raise WeightsError("the weights are of a pyramid: create the model with pyramid='det'")
        return given

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters into layers, for layer-wise rates."""
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^(?:feature_norms|norm)", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}


def check_pool(global_pool: str) -> None:
    """Raise ValueError if a pooling changes the number of channels."""
    if SelectAdaptivePool2d(pool_type=global_pool).feat_mult() != 1:
        raise ValueError(f"global_pool={global_pool!r} changes the width: use 'avg' or 'max'")


def check_pyramid(pyramid: str, known: Sequence[str] = ("", "det")) -> None:
    """Raise ValueError unless there is such a pyramid."""
    if pyramid not in known:
        raise ValueError(f"pyramid={pyramid!r} is none of {known}")


def check_stages(dims: Sequence[int], depths: Sequence[int], heads: Sequence[int]) -> None:
    """Raise ValueError unless stages have one width, depth and number of heads that fit.

    Args:
        dims: Width of every stage.
        depths: Its blocks.
        heads: Its heads.
    """
    if not len(dims) == len(depths) == len(heads):
        raise ValueError(
            f"embed_dims={dims}, depths={depths} and num_heads={heads} must be of equal length"
        )
    for dim, count in zip(dims, heads, strict=True):
        if count < 1 or dim % count:
            raise ValueError(f"embed_dims={dims} must be multiples of num_heads={heads}")


def init_truncated(module: nn.Module) -> None:
    """Initialize a linear layer or a convolution: weights normal, cut off, biases zero."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _fuse_children(module: nn.Module) -> None:
    for name, child in module.named_children():
        fuse = getattr(child, "fuse", None)
        if callable(fuse):
            child = fuse()
            setattr(module, name, child)
        _fuse_children(child)
