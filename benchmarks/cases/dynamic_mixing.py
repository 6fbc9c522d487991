"""The calls of `dynamic_mixing`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._case import BATCHES, DETECTION, Case, Floor, Tensors, normal, tiny

SMALL = 5
# size of the large windows by stage, from 0
LARGE = {2: 13, 3: 7}
# channels and heads of stages 2 and 3
MODELS = {
    "overlock_xt": ((256, 8), (336, 12)),
    "overlock_t": ((256, 8), (512, 16)),
    "overlock_s": ((320, 16), (512, 32)),
    "overlock_b": ((384, 12), (576, 18)),
}


@dataclass(frozen=True, kw_only=True)
class MixingCase(Case):
    """A call of `dynamic_mixing`.

    Attributes:
        heads: Number of heads.
        large: Size of the large windows; that of the small ones is 5.
    """

    op: ClassVar[str] = "dynamic_mixing"

    heads: int
    large: int

    @property
    def slots(self) -> int:
        """Slots of a small and a large window."""
        return SMALL**2 + self.large**2

    def tensors(self, device: str, seed: int = 0) -> Tensors:
        """Make the six arguments; bias and tables in float32."""
        size, half = (self.batch, self.height, self.width), self.channels // 2
        shape = (self.batch, self.heads, half // self.heads, self.slots)
        scale = (2 * half // self.heads) ** -0.5
        maps = {
            "query": normal((*size, half), device, seed) * scale,
            "kernel": normal(shape, device, seed + 1),
            "value": normal((*size, 2 * half), device, seed + 2),
        }
        tables = {
            f"table_{name}": normal((self.heads, 2 * k - 1, 2 * k - 1), device, 0)
            for name, k in (("small", SMALL), ("large", self.large))
        }
        rounded = {name: x.to(self.dtype) for name, x in maps.items()}
        return {**rounded, "bias": normal((self.slots,), device, 0), **tables}

    def function(self, reference: bool = False) -> Callable[..., Tensor]:
        """Return the public op or its reference; both take `tensors` by name."""
        from backbones import ops

        return ops.dynamic_mixing_reference if reference else ops.dynamic_mixing

    def launch(self) -> None:
        """Call the launchers of the forward and the backward kernels with meta tensors."""
        from backbones.ops.triton import dynamic_mixing as launchers

        inputs = tuple(self.tensors("meta").values())
        out, lse = launchers.forward(*inputs)
        launchers.backward(torch.empty_like(out), *inputs, out, lse)

    def floor(self, mode: str) -> Floor:
        """Count the maps and the kernels; 2 products over the slots of a pixel, or 7.

        Forward reads queries, values and kernels and writes one map; backward reads them and the
        gradient and writes three gradients. Logits and the sum of the values are two products,
        logits again and four gradients five more. Tables are left out.
        """
        size, slots = self.pixels * self.channels, self.channels // 2 * self.slots
        half_maps, kernels, products = (13, 3, 7) if mode == "training" else (5, 1, 2)
        bytes = (half_maps * size // 2 + kernels * self.batch * slots) * self.dtype.itemsize
        return Floor(bytes, products * 2 * self.pixels * slots)


def _overlock(model: str, image: tuple[int, int]) -> Iterator[MixingCase]:
    for stage, (channels, heads) in zip((2, 3), MODELS[model], strict=True):
        height, width = (-(-size // (4 << stage)) for size in image)
        yield MixingCase(
            model=model,
            image=image,
            stage=stage,
            batch=BATCHES[image],
            height=height,
            width=width,
            channels=channels,
            heads=heads,
            large=LARGE[stage],
        )


def cases() -> list[MixingCase]:
    """List the calls of `dynamic_mixing` by OverLoCK's Focus-Net."""
    images = ((224, 224), DETECTION)
    return [case for image in images for model in MODELS for case in _overlock(model, image)]


def tiny_cases() -> list[MixingCase]:
    """List a call of every kind that a CPU makes in an instant."""
    return [
        MixingCase(**tiny(7, 7), channels=56, heads=2, large=7),
        MixingCase(**tiny(9, 20), channels=32, heads=2, large=7),
    ]
