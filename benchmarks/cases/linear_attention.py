"""The calls of `linear_attention`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._case import DETECTION, Case, Floor, Tensors, four_stages, normal, tiny

HEAD_DIM = 32


@dataclass(frozen=True, kw_only=True)
class LinearCase(Case):
    """A call of `linear_attention`, as L2ViT makes it."""

    op: ClassVar[str] = "linear_attention"

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.channels // HEAD_DIM

    def tensors(self, device: str, seed: int = 0) -> Tensors:
        """Make `qkv` `(B, H, W, 3C)` and `temperature` `(heads,)`, which remains in float32."""
        shape = (self.batch, self.height, self.width, 3 * self.channels)
        temperature = torch.full((self.heads,), HEAD_DIM**-0.5, device=device)
        return {
            "qkv": normal(shape, device, seed + 1).to(self.dtype),
            "temperature": temperature,
        }

    def function(self, reference: bool = False) -> Callable[..., Tensor]:
        """Return the public op or its reference; both take `tensors` by name."""
        from backbones import ops

        return ops.linear_attention_reference if reference else ops.linear_attention

    def launch(self) -> None:
        """Call the launchers of the forward and the backward kernels with meta tensors."""
        from backbones.ops.triton import linear_attention as launchers

        qkv, temperature = self.tensors("meta").values()
        launchers.forward(qkv, temperature, 100.0, False)
        out, state = launchers.forward(qkv, temperature, 100.0, True)
        launchers.backward(torch.empty_like(out), qkv, temperature, state, 100.0)

    def floor(self, mode: str) -> Floor:
        """Count 4 maps of C channels forward (q, k, v, out), 11 with the backward pass.

        That reads q, k, v and the gradient once and writes three gradients: 7 more. Two products
        with matrices of the heads and one with a vector forward; four and two more backward.
        Matrices of the heads are left out.
        """
        maps, products, vectors = (11, 6, 3) if mode == "training" else (4, 2, 1)
        size = self.pixels * self.channels
        return Floor(maps * size * self.dtype.itemsize, 2 * size * (products * HEAD_DIM + vectors))


def _l2vit(model: str, image: tuple[int, int], channels: int) -> Iterator[LinearCase]:
    for stage in four_stages(model, image, channels):
        yield LinearCase(**stage)


def cases() -> list[LinearCase]:
    """List the calls of `linear_attention` by L2ViT; S has the widths of T."""
    return [
        *_l2vit("l2vit_tiny", (224, 224), 96),
        *_l2vit("l2vit_base", (224, 224), 128),
        *_l2vit("l2vit_base_384", (384, 384), 128),
        *_l2vit("l2vit_tiny", DETECTION, 96),
    ]


def tiny_cases() -> list[LinearCase]:
    """List a call that a CPU makes in an instant."""
    return [LinearCase(**tiny(9, 11), channels=64)]
