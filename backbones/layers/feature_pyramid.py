"""Parts of feature pyramids and their anchors that torchvision lacks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock


class LastLevelConv(ExtraFPNBlock):
    """One more map, by a 3x3 convolution of stride 2 on the last map of the backbone.

    Args:
        in_dim: Width of that map.
        dim: Width of the pyramid.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 3, 2, 1)
        _init_conv(self.conv)

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        """Add a map to those of the pyramid, `results`; `x` are those of the backbone."""
        return [*results, self.conv(x[-1])], [*names, "conv"]


class UpsampledPyramid(FeaturePyramidNetwork):
    """A feature pyramid with maps of twice the size, four times the size and so on.

    For backbones whose first map has a stride of 16: a chain of transposed 2x2 convolutions starts
    from the finest map before its output convolution, and each map of the chain has an output
    convolution too. This is the neck of the official detectors of SHViT (arXiv 2401.16456), which
    they have from EfficientViT (Liu et al., https://arxiv.org/abs/2305.07027).

    Args:
        in_dims: Widths of the maps of the backbone.
        dim: Width of the pyramid.
        upsampled: How many maps to add.
        extra_blocks: What adds coarser maps.
    """

    def __init__(
        self,
        in_dims: Sequence[int],
        dim: int,
        upsampled: int,
        extra_blocks: ExtraFPNBlock | None = None,
    ) -> None:
        super().__init__(list(in_dims), dim, extra_blocks)
        self.upsamples = nn.ModuleList(nn.ConvTranspose2d(dim, dim, 2, 2) for _ in range(upsampled))
        self.upsample_blocks = nn.ModuleList(
            nn.Conv2d(dim, dim, 3, padding=1) for _ in range(upsampled)
        )
        for conv in (*self.upsamples, *self.upsample_blocks):
            _init_conv(conv)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take maps of the backbone, finest first; return those of the pyramid, named by number."""
        maps = list(x.values())
        merged = self.get_result_from_inner_blocks(maps[-1], -1)
        results = [self.get_result_from_layer_blocks(merged, -1)]
        for index in reversed(range(len(maps) - 1)):
            lateral = self.get_result_from_inner_blocks(maps[index], index)
            merged = lateral + F.interpolate(merged, size=lateral.shape[2:], mode="nearest")
            results.insert(0, self.get_result_from_layer_blocks(merged, index))
        for upsample, block in zip(self.upsamples, self.upsample_blocks, strict=True):
            merged = upsample(merged)
            results.insert(0, block(merged))
        names = [str(index) for index in range(len(results))]
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, maps, names)
        return OrderedDict(zip(names, results, strict=True))


class StrideAnchors(AnchorGenerator):
    """Anchors at the strides of the maps.

    torchvision divides the size of the images by that of a map instead, which is off where a map
    was rounded up: 800 rows and 13 of stride 64 give 61.

    Args:
        strides: Of the maps, finest first.
        scales: Sides of the anchors of a map, over its stride.
        aspect_ratios: Heights over widths, for each side.
    """

    def __init__(
        self,
        strides: Sequence[int],
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
    ) -> None:
        sizes = tuple(tuple(int(stride * scale) for scale in scales) for stride in strides)
        super().__init__(sizes, (tuple(aspect_ratios),) * len(strides))
        self.strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Compute the anchors `(N, 4)` of every image, those of the first map first.

        Args:
            image_list: A batch of images.
            feature_maps: Maps `(B, C, H, W)`.
        """
        like = feature_maps[0]
        self.set_cell_anchors(like.dtype, like.device)
        sizes = [list(value.shape[2:]) for value in feature_maps]
        steps = [[torch.tensor(stride, device=like.device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors(sizes, steps))
        return [anchors] * len(image_list.image_sizes)


def _init_conv(conv: nn.Module) -> None:
    """First values as torchvision's feature pyramid has them."""
    assert isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d)) and conv.bias is not None
    nn.init.kaiming_uniform_(conv.weight, a=1)
    nn.init.zeros_(conv.bias)
