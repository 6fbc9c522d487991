"""The calls of `depthwise_conv_moments`: the large kernels of OverLoCK in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from backbones.layers.dilated_reparam import BRANCHES

from ._case import BATCHES, Case, Floor, Tensors, normal, tiny


@dataclass(frozen=True, kw_only=True)
class MomentsCase(Case):
    """A call of `depthwise_conv_moments` for all kernels of a layer.

    Attributes:
        kernel: Rows of the large kernel; the others go with it.
    """

    op: ClassVar[str] = "depthwise_conv_moments"

    kernel: int

    @property
    def name(self) -> str:
        """Unique within a dtype."""
        return f"{super().name}.{self.kernel}x{self.kernel}"

    @property
    def branches(self) -> list[tuple[int, int]]:
        """Sizes and dilations of all kernels."""
        return [(self.kernel, 1), *BRANCHES[self.kernel]]

    @property
    def on_matrix_units(self) -> bool:
        """Whether matrix units can do what it computes: small kernels run elsewhere."""
        return False

    @property
    def other_types(self) -> tuple[torch.dtype, ...]:
        """Types beside bfloat16 that our kernels compute it in."""
        return (torch.float16,)

    def tensors(self, device: str, seed: int = 0) -> Tensors:
        """Make `x`, and kernels by names of their size and dilation."""
        shape = (self.batch, self.height, self.width, self.channels)
        tensors = {"x": normal(shape, device, seed + 1)}
        for n, (size, dilation) in enumerate(self.branches):
            weight = normal((self.channels, 1, size, size), device, n) / size
            tensors[f"weight_{size}_{dilation}"] = weight
        return {name: tensor.to(self.dtype) for name, tensor in tensors.items()}

    def function(self, reference: bool = False) -> Callable[..., Any]:
        """Return the public op or its reference; both take `tensors` by name."""
        from backbones import ops

        compute = getattr(ops, self.op + "_reference" * reference)
        dilations = [dilation for _, dilation in self.branches]

        def function(x: Tensor, **weights: Tensor) -> tuple[Tensor, Tensor]:
            return compute(x, list(weights.values()), dilations)

        return function

    def launch(self) -> None:
        """Call the launchers of the forward and the backward kernels with meta tensors."""
        from backbones.ops import _choice
        from backbones.ops import _depthwise_dilated as dilated

        x, *weights = self.tensors("meta").values()
        with _choice.forced(True):
            for weight, place in zip(weights, self.branches, strict=True):
                at = dilated.Dilated(*place)
                z = dilated.forward(x, weight, at)
                dilated.grad_input(z, x, weight, at)
                dilated.grad_weight(z, x, weight, at)

    def floor(self, mode: str) -> Floor:
        """Count the map forward, the map and its gradient backward.

        The backward pass convolves anew.
        """
        maps, passes = (3, 4) if mode == "training" else (1, 1)
        size = self.pixels * self.channels
        taps = sum(size**2 for size, _ in self.branches)
        return Floor(maps * size * self.dtype.itemsize, passes * 2 * size * taps)


def _stages() -> Iterator[dict[str, Any]]:
    stages = zip((56, 112, 256, 336), (17, 15, 13, 7), strict=True)
    for stage, (channels, kernel) in enumerate(stages):
        side = 56 >> stage
        yield {
            "model": "overlock_xt",
            "image": (224, 224),
            "stage": stage,
            "batch": BATCHES[224, 224],
            "height": side,
            "width": side,
            "channels": channels,
            "kernel": kernel,
        }


def cases() -> list[MomentsCase]:
    """List the calls of `depthwise_conv_moments` by OverLoCK."""
    return [MomentsCase(**stage) for stage in _stages()]


def tiny_cases() -> list[MomentsCase]:
    """List a call that a CPU makes in an instant."""
    return [MomentsCase(**tiny(9, 7), channels=4, kernel=7)]
