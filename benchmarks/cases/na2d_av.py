"""The calls of `na2d_av` that OverLoCK made with natten 0.17, and `dynamic_mixing` replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ._case import DETECTION, Case, Floor, Tensors, normal, tiny
from .dynamic_mixing import MixingCase
from .dynamic_mixing import cases as mixing_cases


@dataclass(frozen=True, kw_only=True)
class WindowSumCase(Case):
    """A call of `na2d_av` on a map of `channels`, those of all heads.

    Attributes:
        heads: Number of heads.
        size: Rows, and columns, of a window.
    """

    op: ClassVar[str] = "na2d_av"

    heads: int
    size: int

    @property
    def name(self) -> str:
        """Unique within an op and a dtype."""
        return f"{super().name}.k{self.size}"

    def tensors(self, device: str, seed: int = 0) -> Tensors:
        """Make `attn` `(B, G, H, W, K * K)`, a softmax, and `value` `(B, G, H, W, D)`."""
        shape = (self.batch, self.heads, self.height, self.width)
        attn = normal((*shape, self.size**2), device, seed).softmax(dim=-1)
        value = normal((*shape, self.channels // self.heads), device, seed + 1)
        return {"attn": attn.to(self.dtype), "value": value.to(self.dtype)}

    def function(self, reference: bool = False) -> Callable[..., Tensor]:
        """Return the public op or its reference; both take `tensors` by name."""
        from backbones import ops

        function = ops.na2d_av_reference if reference else ops.na2d_av
        return partial(function, kernel_size=self.size)

    def launch(self) -> None:
        """Call the launchers of the forward and the backward kernels with meta tensors."""
        from backbones.ops.triton import na2d_av as launchers

        inputs, sizes = self.tensors("meta").values(), ((self.size, self.size), (1, 1))
        out = launchers.forward(*inputs, *sizes)
        launchers.backward(torch.empty_like(out), *inputs, *sizes)

    def floor(self, mode: str) -> Floor:
        """Count the weights once and 2 maps forward, and with the backward pass 3 times and 5 maps.

        Forward reads weights and values and writes a map; backward reads them and the gradient and
        writes two gradients. One product over the slots of a pixel forward, two more backward.
        """
        weights, maps, products = (3, 5, 3) if mode == "training" else (1, 2, 1)
        slots = self.size**2
        numbers = self.pixels * (weights * self.heads * slots + maps * self.channels)
        flops = 2 * products * self.pixels * slots * self.channels
        return Floor(numbers * self.dtype.itemsize, flops)


def _halves(case: MixingCase) -> Iterator[WindowSumCase]:
    """What `dynamic_mixing` computes in one call."""
    for size in (5, case.large):
        yield WindowSumCase(
            model=case.model,
            image=case.image,
            stage=case.stage,
            batch=case.batch,
            height=case.height,
            width=case.width,
            channels=case.channels // 2,
            heads=case.heads,
            size=size,
        )


def cases() -> list[WindowSumCase]:
    """List the calls of `na2d_av` by OverLoCK-T, and on large maps by S, of smaller heads."""
    return [
        half
        for case in mixing_cases()
        if case.model == "overlock_t" or (case.model, case.image) == ("overlock_s", DETECTION)
        for half in _halves(case)
    ]


def tiny_cases() -> list[WindowSumCase]:
    """List a call that a CPU makes in an instant."""
    return [WindowSumCase(**tiny(6, 19), channels=20, heads=2, size=5)]
