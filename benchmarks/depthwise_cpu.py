"""Compare ways to compute a depthwise convolution on a CPU with PyTorch, as ratios.

    python benchmarks/depthwise_cpu.py            a table
    python benchmarks/depthwise_cpu.py --write    also benchmarks/results/depthwise_cpu.json

The op's PyTorch form (`ops/_depthwise_pytorch.py`) is to be the fastest that is exact. Maps are
channels-last, as the op takes and returns them: ways that compute on planes pay for both copies.
Every number is the time of a way over that of the op's, best of many in turns, so that a busy
machine disturbs all alike.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops import _depthwise_pytorch
from backbones.ops._depthwise import Fused, Window
from benchmarks._cpu import Row, Ways, best_times, run

RESULT = Path(__file__).resolve().parent / "results" / "depthwise_cpu.json"
BATCHES = (1, 8)


class Shape(NamedTuple):
    """A square map and its kernels."""

    channels: int
    side: int
    kernel: int
    stride: int = 1


# 3x3: DaViT, MaxViT, SHViT; 5x5: BiFormer; 7x7: L2ViT; from there on OverLoCK
SHAPES = [
    *(Shape(96 << stage, 56 >> stage, 3) for stage in range(4)),
    Shape(256, 112, 3, 2),
    Shape(896, 16, 3, 2),
    *(Shape(64 << stage, 56 >> stage, 5) for stage in range(3)),
    *(Shape(96 << stage, 56 >> stage, 7) for stage in range(4)),
    *(Shape(256, side, kernel) for kernel in (9, 11, 13) for side in (14, 28)),
    Shape(112, 28, 15),
    Shape(56, 56, 17),
]


def planes(function: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    """Compute on planes and return a channels-last map, both `(B, C, H, W)`."""
    return function(*(m.contiguous() for m in maps)).contiguous(memory_format=torch.channels_last)


def forward_ways(x: Tensor, weight: Tensor, shape: Shape) -> Ways:
    """Ways to convolve `x` `(B, C, H, W)`."""

    def conv(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, shape.stride, shape.kernel // 2, 1, shape.channels)

    at = Window(shape.kernel, shape.stride)
    return {
        "op": lambda: _depthwise_pytorch.forward(
            x.permute(0, 2, 3, 1), weight, None, None, at, Fused(), ""
        ),
        "channels_last": lambda: conv(x),
        "planes": lambda: planes(conv, x),
    }


def residual_ways(x: Tensor, weight: Tensor, shape: Shape) -> Ways:
    """Ways to convolve `x` and add it."""

    def conv(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, 1, shape.kernel // 2, 1, shape.channels)

    at, fused, maps = Window(shape.kernel), Fused(residual=True), x.permute(0, 2, 3, 1)
    return {
        "op": lambda: _depthwise_pytorch.forward(maps, weight, None, None, at, fused, ""),
        "added channels_last": lambda: x + conv(x),
        "added planes": lambda: planes(lambda x: x + conv(x), x),
    }


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, shape: Shape, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the map and the kernels by PyTorch's own formula."""
    sizes = [shape.stride] * 2, [shape.kernel // 2] * 2, [1, 1]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, *sizes, False, [0, 0], shape.channels, mask
    )


def grad_input_ways(grad: Tensor, x: Tensor, weight: Tensor, shape: Shape) -> Ways:
    """Ways to compute the gradient of `x`."""

    def formula(grad: Tensor, x: Tensor) -> Tensor:
        return backward(grad, x, weight, shape, [True, False, False])[0]

    def turned(grad: Tensor) -> Tensor:
        return F.conv2d(grad, weight.flip(2, 3), None, 1, shape.kernel // 2, 1, shape.channels)

    maps, at = (grad.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)), Window(shape.kernel, shape.stride)
    ways: Ways = {
        "op": lambda: _depthwise_pytorch.grad_input(*maps, weight, at, Fused()),
        "formula channels_last": lambda: formula(grad, x),
        "formula planes": lambda: planes(formula, grad, x),
    }
    if shape.stride == 1:
        ways["turned channels_last"] = lambda: turned(grad)
        ways["turned planes"] = lambda: planes(turned, grad)
    return ways


def grad_weight_ways(grad: Tensor, x: Tensor, weight: Tensor, shape: Shape) -> Ways:
    """Ways to compute the gradient of the kernels; the op also sums that of the bias."""

    def formula(grad: Tensor, x: Tensor) -> Tensor:
        return backward(grad, x, weight, shape, [False, True, False])[1]

    maps, at = (grad.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)), Window(shape.kernel, shape.stride)
    return {
        "op": lambda: _depthwise_pytorch.grad_weight(*maps, weight, at, Fused()),
        "channels_last": lambda: formula(grad, x),
        "planes": lambda: formula(grad.contiguous(), x.contiguous()),
    }


def ratios(ways: Ways, seconds: float) -> dict[str, float]:
    """Time of each way over that of the op."""
    best = best_times(ways, seconds)
    return {name: round(best[name] / best["op"], 2) for name in ways if name != "op"}


def measure(shape: Shape, batch: int, seconds: float) -> list[Row]:
    """Compare all ways of one shape."""
    form = {"memory_format": torch.channels_last}
    size = (batch, shape.channels, shape.side, shape.side)
    x = torch.randn(size).contiguous(**form)
    weight = torch.randn(shape.channels, 1, shape.kernel, shape.kernel)
    grad = torch.randn_like(F.conv2d(x[:, :1], weight[:1], None, shape.stride, shape.kernel // 2))
    grad = grad.expand(-1, shape.channels, -1, -1).contiguous(**form)
    passes: dict[str, Ways] = {
        "forward": forward_ways(x, weight, shape),
        "grad_input": grad_input_ways(grad, x, weight, shape),
        "grad_weight": grad_weight_ways(grad, x, weight, shape),
    }
    if shape.stride == 1:
        passes["residual"] = residual_ways(x, weight, shape)
    base = {"batch": batch, **shape._asdict()}
    return [{**base, "pass": name, **ratios(ways, seconds)} for name, ways in passes.items()]


def measure_all(seconds: float) -> Iterator[Row]:
    """Compare all shapes and batches."""
    for shape, batch in itertools.product(SHAPES, BATCHES):
        yield from measure(shape, batch, seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return run(measure_all, RESULT, argv, __doc__.splitlines()[0], 1.0)


if __name__ == "__main__":
    sys.exit(main())
