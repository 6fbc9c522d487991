"""The calls of `routing_attention`, and of `route_regions` before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor

from ._case import DETECTION, Case, Floor, Tensors, four_stages, normal, tiny

HEAD_DIM = 32
# regions to choose, by stage; the last one has softmax attention
TOPK = (1, 4, 16)
# regions a side, by image
SIDES = {(224, 224): 7, DETECTION: 16}


@dataclass(frozen=True, kw_only=True)
class RoutingCase(Case):
    """A call of `routing_attention` with regions chosen at random.

    Attributes:
        topk: Regions that each region attends to.
        num_regions: Rows and columns of regions.
        region_size: Rows and columns of tokens in a region.
        pad: With a vector for tokens outside the map; they are zeros without.
    """

    op: ClassVar[str] = "routing_attention"

    topk: int
    num_regions: tuple[int, int]
    region_size: tuple[int, int]
    pad: bool = True

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.channels // HEAD_DIM

    @property
    def count(self) -> int:
        """Regions of an image."""
        return self.num_regions[0] * self.num_regions[1]

    @property
    def keys(self) -> int:
        """Keys that a query attends to, those outside the map included."""
        return self.topk * self.region_size[0] * self.region_size[1]

    def tensors(self, device: str, seed: int = 0) -> Tensors:
        """Make `qkv` `(B, H, W, 3C)` and, where the case has it, `pad`."""
        packed = 3 * self.channels
        shape = (self.batch, self.height, self.width, packed)
        tensors = {"qkv": normal(shape, device, seed + 1).to(self.dtype)}
        if self.pad:
            tensors["pad"] = normal((packed,), device, 0).to(self.dtype)
        return tensors

    def regions(self, device: str | None = None) -> Tensor:
        """Choose regions `(B, R, topk)` at random, by default where calls are timed."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        draws = normal((self.batch, self.count, self.count), device, 0)
        return draws.topk(self.topk, dim=-1).indices

    def function(self, reference: bool = False) -> Callable[..., Tensor]:
        """Return the public op or its reference; both take `tensors` by name."""
        from backbones import ops

        return partial(
            ops.routing_attention_reference if reference else ops.routing_attention,
            regions=self.regions(),
            num_heads=self.heads,
            num_regions=self.num_regions,
            region_size=self.region_size,
        )

    def launch(self) -> None:
        """Call the launchers of all kernels, the means of regions too, with meta tensors."""
        from backbones.ops._regions import Regions
        from backbones.ops.triton import route_regions
        from backbones.ops.triton import routing_attention as launchers

        inputs, at = self.tensors("meta"), Regions(*self.num_regions, *self.region_size)
        qkv, pad = inputs["qkv"], inputs.get("pad")
        route_regions.region_means(qkv, pad, at)
        tensors = (qkv, self.regions("meta"), pad)
        fixed = (self.heads, at, self.channels**-0.5)
        out, lse = launchers.forward(*tensors, *fixed)
        launchers.backward(torch.empty_like(out), *tensors, out, lse, *fixed)

    def floor(self, mode: str) -> Floor:
        """Count 4 maps of C channels forward (q, k, v, out), 12 with the backward pass.

        That reads q, k, v, the output and the gradient once and writes three gradients: 8 more. Two
        matrix products forward, five more backward. Choices and exponentials are left out; regions
        count whole.
        """
        maps, products = (12, 7) if mode == "training" else (4, 2)
        size = self.pixels * self.channels * self.dtype.itemsize
        queries = self.batch * self.count * self.region_size[0] * self.region_size[1]
        return Floor(maps * size, products * 2 * queries * self.keys * self.channels)


def _biformer(
    model: str, image: tuple[int, int], channels: int, floored: bool = False
) -> Iterator[RoutingCase]:
    n = SIDES[image]
    stages = islice(four_stages(model, image, channels), len(TOPK))
    for topk, stage in zip(TOPK, stages, strict=True):
        sides = stage["height"], stage["width"]
        # the op of biformer_stl_nchw fixes the size of regions first, the other one their count
        size = [side // n if floored else -(-side // n) for side in sides]
        count = [-(-side // s) if floored else n for side, s in zip(sides, size, strict=True)]
        yield RoutingCase(
            **stage,
            topk=topk,
            num_regions=(count[0], count[1]),
            region_size=(size[0], size[1]),
            # no token reads it where the regions fill the map
            pad=not floored and (count[0] * size[0], count[1] * size[1]) != sides,
        )


def cases() -> list[RoutingCase]:
    """List the calls of `routing_attention` by BiFormer; tiny makes those of small."""
    return [
        *_biformer("biformer_small", (224, 224), 64),
        *_biformer("biformer_base", (224, 224), 96),
        *_biformer("biformer_small", DETECTION, 64),
        *_biformer("biformer_stl_nchw", DETECTION, 96, floored=True),
        *_padded(),
    ]


def _padded() -> Iterator[RoutingCase]:
    """Images that BiFormer's 7 x 7 regions do not fill, one for each form of the kernels."""
    for pad, size in ((True, 13), (False, 13), (True, 50), (False, 50)):
        yield RoutingCase(
            model=f"biformer_small{'' if pad else '_zeros'}",
            image=(4 * size, 4 * size),
            stage=0,
            batch=128,
            height=size,
            width=size,
            channels=64,
            topk=4,
            num_regions=(7, 7),
            region_size=(-(-size // 7), -(-size // 7)),
            pad=pad,
        )


def tiny_cases() -> list[RoutingCase]:
    """List calls of every kind that a CPU makes in an instant."""

    def regions(height: int, width: int, n: int, topk: int, pad: bool) -> RoutingCase:
        size = (-(-height // n), -(-width // n))
        shape = tiny(height, width)
        return RoutingCase(
            **shape, channels=64, topk=topk, num_regions=(n, n), region_size=size, pad=pad
        )

    return [regions(14, 21, 7, 4, False), regions(13, 9, 3, 2, False), regions(9, 13, 3, 2, True)]
