"""The calls of `depthwise_conv` and `depthwise_conv_mean`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from backbones.ops._choice import MATRICES

from ._case import BATCHES, DETECTION, Case, Floor, Tensors, normal, tiny


@dataclass(frozen=True, kw_only=True)
class ConvCase(Case):
    """A call of `depthwise_conv`, or with `mean` of `depthwise_conv_mean`.

    Attributes:
        part: What the convolution is in the model.
        kernel: Rows of the kernels.
        stride: Of the convolution; `height` and `width` are those of its input.
        same: Padded as TensorFlow does.
        residual: Adds what it convolves.
        addend: Adds another map.
        pre_act: Activation before.
        act: Activation behind.
        mean: Also averages the result: "mean", of its squares: "square", or "" for neither.
    """

    op: ClassVar[str] = "depthwise_conv"
    modes: ClassVar[dict[str, int | None]] = {"forward": None, "grad_input": 0, "grad_weight": 1}

    part: str
    kernel: int = 3
    stride: int = 1
    same: bool = False
    residual: bool = False
    addend: bool = False
    pre_act: str = ""
    act: str = ""
    mean: str = ""

    @property
    def name(self) -> str:
        """Unique within a dtype."""
        return f"{super().name}.{self.part}{self.kernel}x{self.kernel}"

    @property
    def other_types(self) -> tuple[torch.dtype, ...]:
        """Types beside bfloat16 that our kernels compute it in."""
        return (torch.float16,) if self.on_matrix_units else super().other_types

    @property
    def on_matrix_units(self) -> bool:
        """Whether matrix units can do what it computes."""
        return self.kernel >= MATRICES

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """Shape of the result."""
        rows, cols = (-(-length // self.stride) for length in (self.height, self.width))
        return self.batch, rows, cols, self.channels

    def tensors(self, device: str, seed: int = 0) -> Tensors:
        """Make `x`, `weight`, `bias` and, where the case has one, `addend`."""
        shape = (self.batch, self.height, self.width, self.channels)
        tensors = {
            "x": normal(shape, device, seed + 1),
            "weight": normal((self.channels, 1, self.kernel, self.kernel), device, 0) / self.kernel,
            "bias": normal((self.channels,), device, 1),
        }
        if self.addend:
            tensors["addend"] = normal(self.out_shape, device, seed + 10**6)
        return {name: tensor.to(self.dtype) for name, tensor in tensors.items()}

    def options(self) -> dict[str, Any]:
        """Arguments that are not tensors."""
        around = {"residual": self.residual, "pre_act": self.pre_act, "act": self.act}
        options = {"stride": self.stride, "same": self.same, **around}
        return {**options, "square": self.mean == "square"} if self.mean else options

    def function(self, reference: bool = False) -> Callable[..., Any]:
        """Return the public op or its reference; both take `tensors` by name."""
        from backbones import ops

        name = self.op + "_mean" * bool(self.mean) + "_reference" * reference
        return partial(getattr(ops, name), **self.options())

    def launch(self) -> None:
        """Call the launchers of the forward and the backward kernels with meta tensors."""
        from backbones.ops._depthwise import Fused, Window
        from backbones.ops.triton import depthwise_conv as launchers

        tensors = {"addend": None, **self.tensors("meta")}
        x, weight, bias, addend = (tensors[name] for name in ("x", "weight", "bias", "addend"))
        at = Window(self.kernel, self.stride, self.same)
        fused = Fused(self.residual, self.pre_act, self.act)
        out, mean = launchers.forward(x, weight, bias, addend, at, fused, self.mean)
        grad, grad_mean = (
            torch.empty_like(out),
            torch.empty_like(mean) if self.mean == "mean" else None,
        )
        dy = launchers.grad_sum(grad, grad_mean, x, weight, bias, at, fused)
        launchers.grad_input(dy, x, weight, at, fused)
        launchers.grad_weight(dy, x, weight, at, fused)

    def floor(self, mode: str) -> Floor:
        """Count the map and the result once each, and what is added or recomputed.

        Kernels and vectors are left out. With an activation behind, a backward pass convolves
        anew.
        """
        large = self.pixels * self.channels
        small = torch.Size(self.out_shape).numel()
        maps = large + small + small * self.addend
        if mode == "grad_input":
            maps = large + small + large * bool(self.pre_act or self.act)
        elif mode == "grad_weight":
            maps = large + small
        passes = 2 if self.act and mode != "forward" else 1
        return Floor(maps * self.dtype.itemsize, passes * 2 * small * self.kernel**2)


def _stages(
    model: str,
    image: tuple[int, int],
    channels: Sequence[int],
    first: int = 0,
    reduction: int = 4,
) -> Iterator[dict[str, Any]]:
    """Arguments of a case for stages from `first` on, of which stage 0 is at `reduction`."""
    for stage, width in enumerate(channels, first):
        rows, cols = (-(-size // (reduction << stage)) for size in image)
        yield {
            "model": model,
            "image": image,
            "stage": stage,
            "batch": BATCHES[image],
            "height": rows,
            "width": cols,
            "channels": width,
        }


def _overlock(image: tuple[int, int]) -> Iterator[ConvCase]:
    stages = _stages("overlock_xt", image, (56, 112, 256, 336))
    for stage, kernel in zip(stages, (17, 15, 13, 7), strict=True):
        yield ConvCase(**stage, part="mixer", kernel=kernel, mean="mean")
    options: dict[str, Any] = {"part": "ffn", "residual": True, "pre_act": "gelu"}
    for stage in _stages("overlock_xt", image, (224, 448, 1024, 1344)):
        yield ConvCase(**stage, **options, mean="square")


def _maxvit(image: tuple[int, int]) -> Iterator[ConvCase]:
    options: dict[str, Any] = {"part": "mbconv", "act": "gelu_tanh", "mean": "mean"}
    # the first block of a stage halves a map of the stage before
    for stage in _stages("maxvit_tiny_tf_224", image, (256, 512, 1024, 2048), reduction=2):
        yield ConvCase(**stage, **options, stride=2, same=True)
    for stage in _stages("maxvit_tiny_tf_224 later", image, (256, 512, 1024, 2048)):
        yield ConvCase(**stage, **options)


def _rest(image: tuple[int, int]) -> Iterator[ConvCase]:
    for stage in _stages("biformer_tiny", image, (64, 128, 256, 512)):
        yield ConvCase(**stage, part="lepe", kernel=5, addend=True)
    for stage in _stages("ravlt_t", image, (224, 448, 896, 1792)):
        yield ConvCase(**stage, part="ffn", residual=True, pre_act="gelu")
    for stage in _stages("l2vit_tiny", image, (96, 192, 384, 768)):
        yield ConvCase(**stage, part="first", kernel=7, act="gelu")
        yield ConvCase(**stage, part="second", kernel=7, addend=True)


def cases() -> list[ConvCase]:
    """List the calls of `depthwise_conv` and `depthwise_conv_mean`."""
    shvit = _stages("shvit_s1", (224, 224), (512, 896), reduction=16)
    return [
        *_rest((224, 224)),
        *_overlock((224, 224)),
        *_maxvit((224, 224)),
        *(ConvCase(**s, part="merge", stride=2, act="relu", mean="mean") for s in shvit),
        *_rest(DETECTION),
        *_overlock(DETECTION),
    ]


def tiny_cases() -> list[ConvCase]:
    """List calls of all kinds that a CPU makes in an instant."""
    return [
        ConvCase(**tiny(9, 11), channels=6, part="lepe", kernel=5, addend=True),
        ConvCase(**tiny(7, 5), channels=6, part="ffn", residual=True, pre_act="gelu"),
        ConvCase(
            **tiny(6, 5), channels=6, part="mbconv", stride=2, same=True, act="silu", mean="mean"
        ),
        ConvCase(**tiny(8, 9), channels=4, part="mixer", kernel=13, mean="mean"),
        ConvCase(
            **tiny(8, 5), channels=4, part="ffn", residual=True, pre_act="gelu", mean="square"
        ),
    ]
