"""The calls of the ops that the models make: one `Case` per op, stage and image size.

The ahead-of-time report, the benchmarks and the tests on a GPU share this list. The batch is 128 at
224 pixels; 96 at 256, 40 at 384 and 24 at 512, for about as many pixels; and 2 at 800 x 1216.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

HEAD_DIM = 32
BATCHES = {(224, 224): 128, (256, 256): 96, (384, 384): 40, (512, 512): 24, (800, 1216): 2}
DETECTION = (800, 1216)

Tensors = dict[str, Tensor]


class Floor(NamedTuple):
    """The least that a call can cost: compulsory bytes and the FLOPs of its matrix products."""

    bytes: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One call of an op on a map `(batch, height, width, channels)`.

    Attributes:
        model: Model that makes the call.
        image: Height and width of its input, in pixels.
        stage: Index of the stage, from 0.
    """

    op: ClassVar[str]
    has_kernels: ClassVar[bool] = False

    model: str
    image: tuple[int, int]
    stage: int
    batch: int
    height: int
    width: int
    channels: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """Unique within an op and a dtype."""
        return f"{self.model}@{self.image[0]}x{self.image[1]}.stage{self.stage}"

    @property
    def pixels(self) -> int:
        """Positions of the map, over the batch."""
        return self.batch * self.height * self.width

    @abstractmethod
    def tensors(self, device: str, seed: int = 0) -> Tensors:
        """Make random inputs; small tables are the same for every seed."""

    @abstractmethod
    def function(self, reference: bool = False) -> Callable[..., Tensor]:
        """Return the public op, or its reference, bound to the options of this case."""

    @abstractmethod
    def floor(self, training: bool) -> Floor:
        """Count what a forward pass needs, or a forward and a backward pass."""

    def launch(self) -> None:
        """Call the launchers of the forward and the backward kernels with meta tensors."""
        raise NotImplementedError(f"{self.op} has no kernels to launch")


@dataclass(frozen=True, kw_only=True)
class WindowCase(Case):
    """A call of `window_attention`.

    Attributes:
        window: Rows and columns of a window.
        grid: Grid partition in place of the block partition.
        table: With a table of relative positions.
        pad: With a vector for tokens outside the map; they are masked without.
        head_first: Channel order of `qkv`.
    """

    op: ClassVar[str] = "window_attention"
    has_kernels: ClassVar[bool] = True

    window: tuple[int, int]
    grid: bool = False
    table: bool = True
    pad: bool = False
    head_first: bool = False

    @property
    def name(self) -> str:
        """Unique within a dtype."""
        p, q = self.window
        return f"{super().name}.{'grid' if self.grid else 'block'}{p}x{q}"

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.channels // HEAD_DIM

    @property
    def windows(self) -> int:
        """Number of windows in the batch, those at the border included."""
        (p, q), rows, cols = self.window, self.height, self.width
        return self.batch * -(-rows // p) * -(-cols // q)

    @property
    def ragged(self) -> bool:
        """Whether windows reach over the border of the map."""
        return self.height % self.window[0] > 0 or self.width % self.window[1] > 0

    def tensors(self, device: str, seed: int = 0) -> Tensors:
        """Make `qkv` `(B, H, W, 3C)` and, where the case has them, `table` and `pad`."""
        (p, q), packed = self.window, 3 * self.channels
        shape = (self.batch, self.height, self.width, packed)
        tensors = {"qkv": _normal(shape, device, seed + 1).to(self.dtype)}
        if self.table:
            tensors["table"] = _normal((self.heads, 2 * p - 1, 2 * q - 1), device, 0)
        if self.pad:
            tensors["pad"] = _normal((packed,), device, 0).to(self.dtype)
        return tensors

    def function(self, reference: bool = False) -> Callable[..., Tensor]:
        """Return the public op or its reference; both take `tensors` by name."""
        from backbones import ops

        return partial(
            ops.window_attention_reference if reference else ops.window_attention,
            table=None,
            num_heads=self.heads,
            window_size=self.window,
            grid=self.grid,
            head_first=self.head_first,
        )

    def launch(self) -> None:
        """Call the launchers of the forward and the backward kernels with meta tensors."""
        from backbones.ops._windows import Windows
        from backbones.ops.triton import window_attention as launchers

        inputs = self.tensors("meta")
        qkv, table, pad = inputs["qkv"], inputs.get("table"), inputs.get("pad")
        windows = Windows(self.heads, *self.window, self.grid, self.head_first, HEAD_DIM**-0.5)
        out, lse = launchers.forward(qkv, table, pad, windows)
        launchers.backward(torch.empty_like(out), qkv, table, pad, out, lse, windows)

    def floor(self, training: bool) -> Floor:
        """Count 4 maps of C channels forward (q, k, v, out), 11 with the backward pass.

        That reads q, k, v and the gradient once and writes three gradients: 7 more. Two matrix
        products forward, five more backward. Tables and exponentials are left out; windows count
        whole.
        """
        maps, products = (11, 7) if training else (4, 2)
        size = self.pixels * self.channels * self.dtype.itemsize
        flops = 2 * self.windows * prod(self.window) ** 2 * self.channels
        return Floor(maps * size, products * flops)


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
        qkv = _normal((*shape, 2 * self.qk_dim + self.values), device, seed + 1)
        x = _normal((*shape, self.channels), device, seed + 10**6)
        return {"qkv": qkv.to(self.dtype), "x": x.to(self.dtype)}

    def function(self, reference: bool = False) -> Callable[..., Tensor]:
        """Return the public op or its reference; both take `tensors` by name."""
        from backbones import ops

        return ops.partial_attention_reference if reference else ops.partial_attention

    def floor(self, training: bool) -> Floor:
        """Count reading qkv and the other channels of x and writing the output.

        The backward pass reads the gradient, qkv and the output and writes both gradients; it forms
        the scores again.
        """
        packed, tokens = 2 * self.qk_dim + self.values, self.height * self.width
        maps, qk, values = packed + 2 * self.channels - self.values, 1, 1
        if training:
            maps, qk, values = maps + 2 * packed + 3 * self.channels, 4, 3
        flops = 2 * self.batch * tokens**2 * (qk * self.qk_dim + values * self.values)
        return Floor(maps * self.pixels * self.dtype.itemsize, flops)


def _normal(shape: tuple[int, ...], device: str, seed: int) -> Tensor:
    if device == "meta":
        return torch.empty(shape, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, device=device, generator=generator)


def _stages(model: str, image: tuple[int, int], channels: int) -> Iterator[dict[str, Any]]:
    """Arguments of `Case` for four stages at strides 4 to 32 whose width doubles."""
    for stage in range(4):
        height, width = (-(-size // (4 << stage)) for size in image)
        yield {
            "model": model,
            "image": image,
            "stage": stage,
            "batch": BATCHES[image],
            "height": height,
            "width": width,
            "channels": channels << stage,
        }


def _maxvit(
    model: str, image: tuple[int, int], window: tuple[int, int], head_first: bool = False
) -> Iterator[WindowCase]:
    for stage in _stages(model, image, 64):
        for grid in (False, True):
            yield WindowCase(**stage, window=window, grid=grid, head_first=head_first)


def _padded(model: str, image: tuple[int, int], channels: int, window: int) -> Iterator[WindowCase]:
    for stage in _stages(model, image, channels):
        yield WindowCase(**stage, window=(window, window), table=False, pad=True)


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


def window_cases() -> list[WindowCase]:
    """List the calls of `window_attention` by MaxViT, DaViT and L2ViT, in bfloat16.

    L2ViT tiny makes the calls of DaViT tiny; its base model has another width.
    """
    return [
        *_maxvit("maxvit_tiny_tf_224", (224, 224), (7, 7)),
        *_padded("davit_tiny", (224, 224), 96, 7),
        *_maxvit("maxvit_tiny_tf_384", (384, 384), (12, 12)),
        *_maxvit("maxvit_tiny_tf_512", (512, 512), (16, 16)),
        *_maxvit("maxvit_tiny_rw_256", (256, 256), (8, 8), head_first=True),
        *_padded("l2vit_base", (224, 224), 128, 7),
        *_padded("l2vit_base_384", (384, 384), 128, 12),
        # windows of 7 are kept and masked at the border; timm makes 64 large windows instead
        *_maxvit("maxvit_tiny_tf_224", DETECTION, (7, 7)),
        *_padded("davit_tiny", DETECTION, 96, 7),
        *_maxvit("maxvit_tiny_tf_224", DETECTION, (25, 38)),
    ]


def partial_cases() -> list[PartialCase]:
    """List the calls of `partial_attention` by SHViT, in bfloat16."""
    small, large = ((224, 320), (48, 68)), ((336, 448), (72, 96))
    return [
        *_shvit("shvit_s1", (224, 224), *small),
        *_shvit("shvit_s4", (256, 256), *large),
        *_shvit("shvit_s4", (512, 512), *large),
        *_shvit("shvit_s4", DETECTION, *large),
    ]


def all_cases() -> list[Case]:
    """List every call, large early stages of common sizes first."""
    return [*window_cases(), *partial_cases()]


def tiny_cases() -> list[Case]:
    """List calls of every kind that a CPU makes in an instant, in float32."""

    def maxvit(height: int, width: int, window: int, **options: Any) -> WindowCase:
        tiny = _tiny(height, width)
        return WindowCase(**tiny, channels=64, window=(window, window), **options)

    return [
        maxvit(14, 21, 7),
        maxvit(14, 21, 7, grid=True),
        maxvit(8, 16, 8, grid=True, head_first=True),
        maxvit(13, 17, 7, grid=True),
        maxvit(13, 17, 7, table=False, pad=True),
        PartialCase(**_tiny(5, 7), channels=60, values=20),
    ]


def _tiny(height: int, width: int) -> dict[str, Any]:
    fixed = {"model": "tiny", "stage": 0, "batch": 2, "dtype": torch.float32}
    return {**fixed, "image": (4 * height, 4 * width), "height": height, "width": width}
