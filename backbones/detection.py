"""torchvision's detectors on the backbones of this package.

    from backbones.detection import build_detector

    detector = build_detector("mask_rcnn", "overlock_t", num_classes=91)

Every detector has a feature pyramid of 256 channels with five maps: at strides 4 to 64 for Faster
and Mask R-CNN, whose heads take all but the last, and at strides 8 to 128 for RetinaNet and FCOS,
as in the official configurations of the families. Where the backbone starts at stride 16 (SHViT),
transposed convolutions make the finer maps, as in its official detectors. Anchors follow the
strides; images are normalized as the backbone's weights want them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from backbones.pretrained import load_weights

from ._backbone import Backbone
from ._registry import create_model
from .catalog import find
from .layers.feature_pyramid import LastLevelConv, StrideAnchors, UpsampledPyramid

__all__ = ["DETECTORS", "DetectionBackbone", "build_detector"]

Detector: TypeAlias = FasterRCNN | RetinaNet | FCOS

DETECTORS: dict[str, Callable[..., Detector]] = {
    "faster_rcnn": FasterRCNN,
    "mask_rcnn": MaskRCNN,
    "retinanet": RetinaNet,
    "fcos": FCOS,
}

_DIM = 256
_MAPS = 5
_RATIOS = (0.5, 1.0, 2.0)
_OCTAVES = (4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3))
# what the official detectors change in a backbone; two families' add no norms to the maps
_FAMILY_ARGS: dict[str, dict[str, Any]] = {"biformer": {"n_win": 16}}
_WITHOUT_NORMS = ("maxvit", "shvit")


class DetectionBackbone(nn.Module):
    """A backbone and a feature pyramid over its maps: five maps of 256 channels.

    Attributes:
        body: The backbone, without what follows the last stage.
        fpn: The feature pyramid.
        strides: Of the maps, finest first.
        out_channels: Their channels.

    Args:
        model: The backbone; it is pruned in place.
        dense: Maps at strides 8 to 128, the coarsest by convolutions; else 4 to 64, the coarsest by
            pooling.
        trainable_stages: How many stages are trained, counted from the last; stem and all others
            are frozen, and stay in evaluation mode. None for all, and the stem. Norms of maps and
            the pyramid are always trained.
        norm_eval: Keep the statistics of all BatchNorms of the backbone as they are.

    Raises:
        ValueError: A number of stages that the model does not have; a model without a map at
            stride 32.
    """

    def __init__(
        self,
        model: Backbone,
        dense: bool = False,
        trainable_stages: int | None = None,
        norm_eval: bool = False,
    ) -> None:
        super().__init__()
        first = 8 if dense else 4
        self.strides = tuple(first * 2**level for level in range(_MAPS))
        reductions = [int(info["reduction"]) for info in model.feature_info]
        if max(reductions) not in (32, 64):
            raise ValueError(f"maps at strides {reductions} make no pyramid: the last must be 32")
        self.indices = [i for i, stride in enumerate(reductions) if stride >= first]
        dims = [int(model.feature_info[i]["num_chs"]) for i in self.indices]
        finest, coarsest = reductions[self.indices[0]], reductions[-1]
        self.body = model
        self.body.prune_intermediate_layers(self.indices, prune_norm=True)
        self.out_channels, self.norm_eval = _DIM, norm_eval
        extra = _extra_maps(dims[-1], coarsest, self.strides[-1])
        if finest == first:
            self.fpn = FeaturePyramidNetwork(dims, _DIM, extra)
        else:
            self.fpn = UpsampledPyramid(dims, _DIM, self.strides.index(finest), extra)
        self._frozen = _freeze(model, trainable_stages)
        self.train(self.training)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the maps `(B, 256, H / stride, W / stride)` of images `(B, C, H, W)`.

        Returns:
            Maps by name, finest first: numbers for those that regions are taken from.
        """
        maps = self.body.forward_intermediates(x, self.indices, intermediates_only=True)
        return self.fpn(OrderedDict((str(index), value) for index, value in enumerate(maps)))

    def train(self, mode: bool = True) -> DetectionBackbone:
        """Switch to training or evaluation, but for what is frozen."""
        super().train(mode)
        for module in self.body.modules():
            if self.norm_eval and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        for module in self._frozen:
            module.eval()
        return self


def build_detector(
    detector: str,
    backbone: str | Backbone = "overlock_t",
    num_classes: int = 91,
    *,
    pretrained_backbone: bool | str | Path = False,
    trainable_stages: int | None = None,
    norm_maps: bool = True,
    norm_eval: bool | None = None,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    backbone_args: Mapping[str, Any] | None = None,
    detector_args: Mapping[str, Any] | None = None,
) -> Detector:
    """Build a detector of torchvision on a backbone.

    Args:
        detector: One of `DETECTORS`.
        backbone: Name of a model, `model.tag` for other weights than its default; or a model, which
            is pruned in place.
        num_classes: Classes, the background among them: 91 for COCO.
        pretrained_backbone: Load the official weights of the classifier; or whatever
            `backbones.pretrained.load_weights` takes: a file, a URL, a repository of the hub, of a
            classifier, of a backbone or of a whole detector, of which `backbone.` is taken.
        trainable_stages: How many stages are trained, counted from the last; None for all, and the
            stem.
        norm_maps: Norm every map as the official backbones of detectors do (`pyramid="det"`); those
            of MaxViT and SHViT do not. Without it too, BiFormer has the 16 regions per side of its
            official detectors.
        norm_eval: Keep the statistics of BatchNorms of the backbone as they are; None to do so with
            pretrained weights.
        min_size: Length that the short side of images is resized to, or lengths to draw from in
            training.
        max_size: Largest length of the long side.
        backbone_args: Arguments of the model, `{"drop_path_rate": 0.2}`.
        detector_args: Further arguments of torchvision's class, `{"box_score_thresh": 0.5}`.

    Returns:
        The detector: `FasterRCNN`, `MaskRCNN`, `RetinaNet` or `FCOS`, with a `DetectionBackbone`.

    Raises:
        ValueError: An unknown detector or model; numbers of classes or stages out of range; a model
            together with arguments to create one.
        WeightsError: Weights that cannot be found, fetched, trusted, read or fit.
    """
    if detector not in DETECTORS:
        raise ValueError(f"detector {detector!r} is none of {tuple(DETECTORS)}")
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: count the background too, 2 or more in all")
    if isinstance(backbone, str):
        model = _create_backbone(backbone, pretrained_backbone, norm_maps, backbone_args or {})
    elif pretrained_backbone or backbone_args:
        raise ValueError(
            "pretrained_backbone and backbone_args are for a backbone that is named: "
            f"load and build the {type(backbone).__name__} before"
        )
    else:
        model = backbone
    keep = bool(pretrained_backbone) if norm_eval is None else norm_eval
    dense = detector in ("retinanet", "fcos")
    cfg = getattr(model, "pretrained_cfg", None) or {}
    args = {
        "image_mean": list(cfg.get("mean", IMAGENET_DEFAULT_MEAN)),
        "image_std": list(cfg.get("std", IMAGENET_DEFAULT_STD)),
        "min_size": min_size,
        "max_size": max_size,
    }
    body = DetectionBackbone(model, dense, trainable_stages, keep)
    args |= _heads(detector, body.strides) | dict(detector_args or {})
    return DETECTORS[detector](body, num_classes, **args)


def _create_backbone(
    name: str, pretrained: bool | str | Path, norm_maps: bool, given: Mapping[str, Any]
) -> Backbone:
    family = find(name)[0].family
    args = {"num_classes": 0, **_FAMILY_ARGS.get(family, {})}
    if norm_maps and family not in _WITHOUT_NORMS:
        args["pyramid"] = "det"
    if not isinstance(pretrained, bool):
        # timm's way of giving weights that are read already: they meet the filter of the family
        args["pretrained_cfg_overlay"] = {"state_dict": {"state_dict": load_weights(pretrained)}}
    model = create_model(name, pretrained=bool(pretrained), **{**args, **given})
    assert isinstance(model, Backbone)
    return model


def _extra_maps(in_dim: int, stride: int, last: int) -> ExtraFPNBlock | None:
    """What adds the maps from `stride` to `last`, whose width is that of the pyramid."""
    if stride == last:
        return None
    if last == 64:
        return LastLevelMaxPool()
    return LastLevelP6P7(in_dim, _DIM) if stride == 32 else LastLevelConv(in_dim, _DIM)


def _heads(detector: str, strides: Sequence[int]) -> dict[str, Any]:
    """Anchors at the strides, and where regions are cut out."""
    if detector == "retinanet":
        return {"anchor_generator": StrideAnchors(strides, _OCTAVES, _RATIOS)}
    if detector == "fcos":
        return {"anchor_generator": StrideAnchors(strides, (1.0,), (1.0,))}
    names = [str(level) for level in range(_MAPS - 1)]
    heads: dict[str, Any] = {
        "rpn_anchor_generator": StrideAnchors(strides, (8.0,), _RATIOS),
        "box_roi_pool": MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
    }
    if detector == "mask_rcnn":
        heads["mask_roi_pool"] = MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2)
    return heads


def _freeze(model: Backbone, trainable_stages: int | None) -> tuple[nn.Module, ...]:
    """Freeze the stem and all stages but the last `trainable_stages`; return what is frozen."""
    if trainable_stages is None:
        return ()
    layers = model.feature_layers()
    stages = len(layers) - 1
    if not 0 <= trainable_stages <= stages:
        raise ValueError(f"trainable_stages={trainable_stages} is none of 0 to {stages}")
    frozen = tuple(layer for group in layers[: stages + 1 - trainable_stages] for layer in group)
    for layer in frozen:
        layer.requires_grad_(False)
    return frozen
