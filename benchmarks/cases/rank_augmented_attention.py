"""The calls of `rank_augmented_attention`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ._case import DETECTION, Case, Floor, Tensors, four_stages, normal, tiny

# stages with this attention; later ones have softmax attention
STAGES = 2


@dataclass(frozen=True, kw_only=True)
class RankAugmentedCase(Case):
    """A call of `rank_augmented_attention` with an addend and a gate, as RAVLT makes it.

    Attributes:
        dim: Channels of a head.
    """

    op: ClassVar[str] = "rank_augmented_attention"

    dim: int

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.channels // self.dim

    def tensors(self, device: str, seed: int = 0) -> Tensors:
        """Make `qkv` `(B, H, W, 4C)` and `addend` `(B, H, W, C)`."""
        size = (self.batch, self.height, self.width)
        qkv = normal((*size, 4 * self.channels), device, seed + 1).to(self.dtype)
        return {"qkv": qkv, "addend": normal((*size, self.channels), device, seed).to(self.dtype)}

    def rotary(self, device: str | None = None) -> Tensor:
        """Make the table of positions, by default where calls are timed."""
        from backbones.ops import rotary_table

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        theta = 1e4 ** -torch.linspace(0, 1, self.dim // 4, device=device)
        return rotary_table(theta, max(self.height, self.width))

    def function(self, reference: bool = False) -> Callable[..., Tensor]:
        """Return the public op or its reference; both take `tensors` by name."""
        from backbones import ops

        name = self.op + "_reference" * reference
        fixed = {"rotary": self.rotary(), "num_heads": self.heads, "gated": True}
        return partial(getattr(ops, name), **fixed)

    def launch(self) -> None:
        """Call the launchers of the forward and the backward kernels with meta tensors."""
        from backbones.ops.triton import rank_augmented_attention as launchers

        qkv, addend = self.tensors("meta").values()
        bare = qkv[..., : 3 * self.channels].contiguous()
        for packed, extra in ((qkv, addend), (bare, None)):
            fixed = (self.heads, extra is not None)
            inputs = (packed, self.rotary("meta"), extra)
            out, *states = launchers.forward(*inputs, *fixed, True)
            launchers.backward(torch.empty_like(out), *inputs, *states, *fixed)

    def floor(self, mode: str) -> Floor:
        """Count 6 maps of C channels forward, 17 with the backward pass.

        Forward reads q, k, v, gate and addend and writes one; backward reads the same and the
        gradient and writes five: 11 more. Two products with matrices and two with vectors of the
        heads forward; five and four more backward, which computes what is gated anew.
        """
        maps, products, vectors = (17, 7, 6) if mode == "training" else (6, 2, 2)
        size = self.pixels * self.channels
        return Floor(maps * size * self.dtype.itemsize, 2 * size * (products * self.dim + vectors))


def _ravlt(
    model: str, image: tuple[int, int], channels: int, dim: int
) -> Iterator[RankAugmentedCase]:
    for stage in itertools.islice(four_stages(model, image, channels), STAGES):
        yield RankAugmentedCase(**stage, dim=dim)


def cases() -> list[RankAugmentedCase]:
    """List the calls of `rank_augmented_attention` by RAVLT; S makes those of T, and L of B."""
    return [
        case
        for image in ((224, 224), DETECTION)
        for model, channels, dim in (("ravlt_t", 64, 64), ("ravlt_b", 96, 96))
        for case in _ravlt(model, image, channels, dim)
    ]


def tiny_cases() -> list[RankAugmentedCase]:
    """List a call that a CPU makes in an instant."""
    return [RankAugmentedCase(**tiny(5, 7), channels=48, dim=24)]
