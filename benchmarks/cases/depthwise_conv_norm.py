"""The calls of `depthwise_conv_norm`: position encodings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from ._case import DETECTION, Case, Floor, Tensors, four_stages, normal, tiny

KERNEL = 3


@dataclass(frozen=True, kw_only=True)
class NormCase(Case):
    """A call of `depthwise_conv_norm` with 3x3 kernels and a residual."""

    op: ClassVar[str] = "depthwise_conv_norm"
    # the gradient of the norm's weight takes the backward pass of the norm alone
    modes: ClassVar[dict[str, int | None]] = {"forward": None, "grad_norm": 3, "training": None}

    @property
    def on_matrix_units(self) -> bool:
        """Whether matrix units can do what it computes."""
        return False

    def tensors(self, device: str, seed: int = 0) -> Tensors:
        """Make `x`, `weight`, `bias`, `norm_weight` and `norm_bias`."""
        channels = self.channels
        tensors = {
            "x": normal((self.batch, self.height, self.width, channels), device, seed + 1),
            "weight": normal((channels, 1, KERNEL, KERNEL), device, 0) / KERNEL,
            "bias": normal((channels,), device, 1),
            "norm_weight": normal((channels,), device, 2),
            "norm_bias": normal((channels,), device, 3),
        }
        return {name: tensor.to(self.dtype) for name, tensor in tensors.items()}

    def function(self, reference: bool = False) -> Callable[..., Any]:
        """Return the public op or its reference; both take `tensors` by name."""
        from backbones import ops

        name = self.op + "_reference" * reference
        return partial(getattr(ops, name), residual=True)

    def launch(self) -> None:
        """Call the launchers of the forward and the backward kernels with meta tensors."""
        from backbones.ops._depthwise import Fused, Window
        from backbones.ops.triton import depthwise_conv as launchers

        x, weight, bias, *norm = self.tensors("meta").values()
        at, fused = Window(KERNEL), Fused(residual=True)
        for affine in (norm, [None, None]):
            y, normed, stats = launchers.forward_norm(x, weight, bias, *affine, 1e-5, at, fused)
            grads = torch.empty_like(y), torch.empty_like(normed)
            dy, *_ = launchers.norm_backward(*grads, y, stats, affine[0])
        launchers.grad_input(dy, x, weight, at, fused)
        launchers.grad_weight(dy, x, weight, at, fused)

    def floor(self, mode: str) -> Floor:
        """Count the map and both results, forward.

        The backward pass of the norm reads two gradients and the result and writes one; that of the
        convolution takes the map, this gradient twice and writes one.
        """
        maps = {"forward": 3, "grad_norm": 4, "training": 3 + 4 + 4}[mode]
        passes = {"forward": 1, "grad_norm": 0, "training": 3}[mode]
        size = self.pixels * self.channels
        return Floor(maps * size * self.dtype.itemsize, passes * 2 * size * KERNEL**2)


def cases() -> list[NormCase]:
    """List the calls of `depthwise_conv_norm` by DaViT; other families have the same widths.

    Under autocast its first stage adds to the result of a LayerNorm, which is float32.
    """
    autocast = next(four_stages("davit_tiny autocast", (224, 224), 96))
    return [
        *(NormCase(**stage) for stage in four_stages("davit_tiny", (224, 224), 96)),
        NormCase(**autocast, dtype=torch.float32),
        *(NormCase(**stage) for stage in four_stages("davit_giant", (224, 224), 384)),
        *(NormCase(**stage) for stage in four_stages("davit_tiny", DETECTION, 96)),
    ]


def tiny_cases() -> list[NormCase]:
    """List a call that a CPU makes in an instant."""
    return [NormCase(**tiny(5, 7), channels=12)]
