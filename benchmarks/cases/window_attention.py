"""The calls of `window_attention`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._case import DETECTION, Case, Floor, Tensors, four_stages, normal, tiny

HEAD_DIM = 32


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
        tensors = {"qkv": normal(shape, device, seed + 1).to(self.dtype)}
        if self.table:
            tensors["table"] = normal((self.heads, 2 * p - 1, 2 * q - 1), device, 0)
        if self.pad:
            tensors["pad"] = normal((packed,), device, 0).to(self.dtype)
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

    def floor(self, mode: str) -> Floor:
        """Count 4 maps of C channels forward (q, k, v, out), 11 with the backward pass.

        That reads q, k, v and the gradient once and writes three gradients: 7 more. Two matrix
        products forward, five more backward. Tables and exponentials are left out; windows count
        whole.
        """
        maps, products = (11, 7) if mode == "training" else (4, 2)
        size = self.pixels * self.channels * self.dtype.itemsize
        flops = 2 * self.windows * prod(self.window) ** 2 * self.channels
        return Floor(maps * size, products * flops)


def _maxvit(
    model: str, image: tuple[int, int], window: tuple[int, int], head_first: bool = False
) -> Iterator[WindowCase]:
    for stage in four_stages(model, image, 64):
        for grid in (False, True):
            yield WindowCase(**stage, window=window, grid=grid, head_first=head_first)


def _padded(model: str, image: tuple[int, int], channels: int, window: int) -> Iterator[WindowCase]:
    for stage in four_stages(model, image, channels):
        yield WindowCase(**stage, window=(window, window), table=False, pad=True)


def cases() -> list[WindowCase]:
    """List the calls of `window_attention` by MaxViT, DaViT and L2ViT.

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


def tiny_cases() -> list[WindowCase]:
    """List calls of every kind that a CPU makes in an instant."""

    def windows(height: int, width: int, window: int, **options: Any) -> WindowCase:
        shape = tiny(height, width)
        return WindowCase(**shape, channels=64, window=(window, window), **options)

    return [
        windows(14, 21, 7),
        windows(14, 21, 7, grid=True),
        windows(8, 16, 8, grid=True, head_first=True),
        windows(13, 17, 7, grid=True),
        windows(13, 17, 7, table=False, pad=True),
    ]
