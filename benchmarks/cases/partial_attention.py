"""The calls of `partial_attention`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._case import BATCHES, DETECTION, Case, Floor, Tensors, normal, tiny


@dataclass(frozen=True, kw_only=True)
class PartialCase(Case):
    """A call of `partial_attention` with 16 channels of queries and of keys.

    Attributes:
        values: Channels that are attended to.
    """

    op: ClassVar[str] = "partial_attention"
    qk_dim: ClassVar[int] = 16

    values: int

    def tensors(self, device: str, seed: int = 0) -> Tensors:
        """Make `qkv` `(B, H, W, 32 + values)` and `x` `(B, H, W, C)`."""
        shape = (self.batch, self.height, self.width)
        qkv = normal((*shape, 2 * self.qk_dim + self.values), device, seed + 1)
        x = normal((*shape, self.channels), device, seed + 10**6)
        return {"qkv": qkv.to(self.dtype), "x": x.to(self.dtype)}

    def function(self, reference: bool = False) -> Callable[..., Tensor]:
        """Return the public op or its reference; both take `tensors` by name."""
        from backbones import ops

        return ops.partial_attention_reference if reference else ops.partial_attention

    def launch(self) -> None:
        """Call the launchers of the forward and the backward kernels with meta tensors."""
        from backbones.ops.triton import partial_attention as launchers

        inputs, scale = self.tensors("meta"), self.qk_dim**-0.5
        out, lse = launchers.forward(*inputs.values(), self.qk_dim, scale)
        grad = torch.empty_like(out)
        launchers.backward(grad, inputs["qkv"], out, lse, self.qk_dim, scale)

    def floor(self, mode: str) -> Floor:
        """Count reading qkv and the other channels of x and writing the output.

        The backward pass reads the gradient, qkv and the output and writes both gradients; it forms
        the scores again.
        """
        packed, tokens = 2 * self.qk_dim + self.values, self.height * self.width
        maps, qk, values = packed + 2 * self.channels - self.values, 1, 1
        if mode == "training":
            maps, qk, values = maps + 2 * packed + 3 * self.channels, 4, 3
        flops = 2 * self.batch * tokens**2 * (qk * self.qk_dim + values * self.values)
        return Floor(maps * self.pixels * self.dtype.itemsize, flops)


def _shvit(
    model: str, image: tuple[int, int], channels: tuple[int, int], values: tuple[int, int]
) -> Iterator[PartialCase]:
    for stage in (1, 2):
        height, width = (-(-size // (16 << stage)) for size in image)
        yield PartialCase(
            model=model,
            image=image,
            stage=stage,
            batch=BATCHES[image],
            height=height,
            width=width,
            channels=channels[stage - 1],
            values=values[stage - 1],
        )


def cases() -> list[PartialCase]:
    """List the calls of `partial_attention` by SHViT."""
    small, large = ((224, 320), (48, 68)), ((336, 448), (72, 96))
    return [
        *_shvit("shvit_s1", (224, 224), *small),
        # values of 66 and 75 channels, whose rows are not aligned
        *_shvit("shvit_s2", (224, 224), (308, 448), (66, 96)),
        *_shvit("shvit_s3", (224, 224), (352, 448), (75, 96)),
        *_shvit("shvit_s4", (256, 256), *large),
        *_shvit("shvit_s4", (512, 512), *large),
        *_shvit("shvit_s4", DETECTION, *large),
    ]


def tiny_cases() -> list[PartialCase]:
    """List calls that a CPU makes in an instant."""
    return [PartialCase(**tiny(5, 7), channels=60, values=20)]
