"""The calls of `neighborhood_attention`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ._case import DETECTION, Case, Floor, Tensors, four_stages, normal, tiny

Pair = tuple[int, int]

HEAD_DIM = 32


@dataclass(frozen=True, kw_only=True)
class NeighborhoodCase(Case):
    """A call of `neighborhood_attention` with square windows.

    Attributes:
        heads: Number of heads.
        size: Rows, and columns, of a window.
        clamp: Windows are shifted inside the map, as NATTEN's are; else zeros surround it.
        shifts: Pairs that the heads use in turn.
    """

    op: ClassVar[str] = "neighborhood_attention"

    heads: int
    size: int = 7
    clamp: bool = False
    shifts: tuple[Pair, ...] = ()

    @property
    def name(self) -> str:
        """Unique within an op and a dtype."""
        form = ".clamp" * self.clamp + ".shift" * bool(self.shifts)
        return f"{super().name}.k{self.size}{form}"

    def tensors(self, device: str, seed: int = 0) -> Tensors:
        """Make `qkv` `(B, H, W, 3C)`."""
        shape = (self.batch, self.height, self.width, 3 * self.channels)
        return {"qkv": normal(shape, device, seed).to(self.dtype)}

    def function(self, reference: bool = False) -> Callable[..., Tensor]:
        """Return the public op or its reference; both take `tensors` by name."""
        from backbones import ops

        return partial(
            ops.neighborhood_attention_reference if reference else ops.neighborhood_attention,
            num_heads=self.heads,
            kernel_size=self.size,
            boundary="clamp" if self.clamp else "zero",
            shifts=list(self.shifts),
        )

    def launch(self) -> None:
        """Call the launchers of the forward and the backward kernels with meta tensors."""
        from backbones.ops.triton import neighborhood_attention as launchers

        qkv = self.tensors("meta")["qkv"]
        scale = (self.channels // self.heads) ** -0.5
        shifts = [number for shift in self.shifts for number in shift]
        window = ((self.size, self.size), (1, 1), scale, self.clamp, shifts)
        out, lse = launchers.forward(qkv, self.heads, *window)
        launchers.backward(torch.empty_like(out), qkv, out, lse, self.heads, *window)

    def floor(self, mode: str) -> Floor:
        """Count 4 maps of C channels forward (q, k, v, out), 11 with the backward pass.

        That reads q, k, v and the gradient once and writes three gradients: 7 more. Two products
        over the slots of a pixel forward, five more backward; slots outside the map count.
        Exponentials, one for each slot of each head, are left out.
        """
        maps, products = (11, 7) if mode == "training" else (4, 2)
        numbers = self.pixels * self.channels
        flops = 2 * products * numbers * self.size**2
        return Floor(maps * numbers * self.dtype.itemsize, flops)


def _tic(model: str, image: Pair, channels: int) -> Iterator[NeighborhoodCase]:
    for stage in four_stages(model, image, channels):
        yield NeighborhoodCase(**stage, heads=stage["channels"] // HEAD_DIM)


def _shifted(case: NeighborhoodCase) -> NeighborhoodCase:
    """The same with TiC's cyclic shifts, one for each diagonal."""
    return replace(case, shifts=((3, 3), (3, -3), (-3, 3), (-3, -3)))


def cases() -> list[NeighborhoodCase]:
    """List the calls of TiC, of which every other block shifts, and of `MSAConv2d`.

    Clamped calls have the shapes of TiC: no model here makes them.
    """
    tiny = list(_tic("tic_tiny", (224, 224), 96))
    detection = list(_tic("tic_tiny", DETECTION, 96))
    wide = replace(tiny[1], model="msa_conv", channels=256, heads=1, size=3)
    return [
        *tiny,
        *map(_shifted, tiny),
        *_tic("tic_base", (224, 224), 128),
        *detection,
        _shifted(detection[0]),
        *(replace(case, clamp=True) for case in (*tiny, detection[0])),
        wide,
    ]


def tiny_cases() -> list[NeighborhoodCase]:
    """List calls of every kind that a CPU makes in an instant."""
    zero = NeighborhoodCase(**tiny(6, 9), channels=32, heads=2, size=3, shifts=((1, -2),))
    return [zero, replace(zero, shifts=(), clamp=True, size=5)]
