"""The calls of `channel_attention`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ._case import DETECTION, Case, Floor, Tensors, four_stages, normal, tiny

HEAD_DIM = 32


@dataclass(frozen=True, kw_only=True)
class ChannelCase(Case):
    """A call of `channel_attention`.

    Attributes:
        mix_values: Florence-2's variant, in place of that of DaViT's classifiers.
    """

    op: ClassVar[str] = "channel_attention"

    mix_values: bool = False

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.channels // HEAD_DIM

    def tensors(self, device: str, seed: int = 0) -> Tensors:
        """Make `qkv` `(B, H, W, 3C)`."""
        shape = (self.batch, self.height, self.width, 3 * self.channels)
        return {"qkv": normal(shape, device, seed + 1).to(self.dtype)}

    def function(self, reference: bool = False) -> Callable[..., Tensor]:
        """Return the public op or its reference; both take `tensors` by name."""
        from backbones import ops

        return partial(
            ops.channel_attention_reference if reference else ops.channel_attention,
            num_heads=self.heads,
            mix_values=self.mix_values,
        )

    def launch(self) -> None:
        """Call the launchers of the forward and the backward kernels with meta tensors."""
        from backbones.ops.triton import channel_attention as launchers

        qkv, arguments = self.tensors("meta")["qkv"], (self.heads, self.mix_values, None)
        launchers.forward(qkv, *arguments, False)
        out, weights = launchers.forward(qkv, *arguments, True)
        launchers.backward(torch.empty_like(out), qkv, weights, *arguments)

    def floor(self, mode: str) -> Floor:
        """Count 4 maps of C channels forward (q, k, v, out), 11 with the backward pass.

        That reads q, k, v and the gradient once and writes three gradients: 7 more. Two matrix
        products forward, four more backward. Matrices of the heads are left out.
        """
        maps, products = (11, 6) if mode == "training" else (4, 2)
        size = self.pixels * self.channels * self.dtype.itemsize
        return Floor(maps * size, products * 2 * self.pixels * self.channels * HEAD_DIM)


def _davit(
    model: str, image: tuple[int, int], channels: int, mix_values: bool = False
) -> Iterator[ChannelCase]:
    for stage in four_stages(model, image, channels):
        yield ChannelCase(**stage, mix_values=mix_values)


def cases() -> list[ChannelCase]:
    """List the calls of `channel_attention` by DaViT."""
    return [
        *_davit("davit_tiny", (224, 224), 96),
        *_davit("davit_base_fl", (768, 768), 128, mix_values=True),
        *_davit("davit_tiny", DETECTION, 96),
    ]


def tiny_cases() -> list[ChannelCase]:
    """List calls of both kinds that a CPU makes in an instant."""
    return [
        ChannelCase(**tiny(9, 11), channels=64),
        ChannelCase(**tiny(5, 7), channels=32, mix_values=True),
    ]
