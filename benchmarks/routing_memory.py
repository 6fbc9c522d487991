"""Compare what BiFormer's attention takes of memory on a CPU: our ways and the official gather.

    python benchmarks/routing_memory.py            a table
    python benchmarks/routing_memory.py --write    also benchmarks/results/routing_memory.json

Every number is the peak of a forward and a backward pass, on top of inputs and parameters, in MiB:
all that PyTorch's allocator gave out, as its profiler saw it, so it is the same in every run. A
share is that of what the official gather takes. "core" is attention alone, of packed queries, keys
and values to regions chosen before; "block" is a whole block of BiFormer-S in training, position
encoding, norms and feed forward network included.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from backbones import ops
from backbones.layers import routing_attention as layers
from backbones.layers.routing_block import RoutingBlock
from backbones.ops._regions import Regions, inside, merge, pad_tokens, partition
from benchmarks._cpu import Row, peak, run
from benchmarks.peers.routing_attention import expanded_attention

RESULT = Path(__file__).resolve().parent / "results" / "routing_memory.json"
BATCH = 8
SIDES = 7


class Shape(NamedTuple):
    """A square map of a stage, and how many regions each region chooses."""

    channels: int
    side: int
    topk: int

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.channels // 32


SHAPES = [Shape(64, 56, 1), Shape(128, 28, 4), Shape(256, 14, 16)]


def gathered(
    qkv: Tensor,
    regions: Tensor,
    num_heads: int,
    num_regions: tuple[int, int],
    region_size: tuple[int, int],
    pad: Tensor | None = None,
) -> Tensor:
    """Attend as the official code does; a stand-in for `routing_attention_reference`."""
    at = Regions(*num_regions, *region_size)
    tokens = pad_tokens(partition(qkv, at), inside(qkv, at), pad)
    return merge(expanded_attention(tokens, regions, num_heads), at, *qkv.shape[1:3])


def official() -> AbstractContextManager[Any]:
    """Let layers gather from an expanded view inside a `with` block."""
    stack = ExitStack()
    stack.enter_context(ops.use_reference())
    stack.enter_context(patch.object(layers, "routing_attention_reference", gathered))
    return stack


# how the attention is computed, alone and in a block
WAYS: dict[str, tuple[Callable[..., Tensor], Callable[[], AbstractContextManager[Any]]]] = {
    "op": (ops.routing_attention, nullcontext),
    "reference": (ops.routing_attention_reference, ops.use_reference),
    "gather": (gathered, official),
}


def core(way: str, shape: Shape) -> Callable[[], None]:
    """A forward and a backward pass of attention alone."""
    size = (BATCH, shape.side, shape.side)
    qkv = torch.randn(*size, 3 * shape.channels, requires_grad=True)
    grad = torch.randn(*size, shape.channels)
    layout = {"num_regions": (SIDES, SIDES), "region_size": (shape.side // SIDES,) * 2}
    regions = ops.route_regions(qkv, shape.topk, **layout)
    function = WAYS[way][0]

    def step() -> None:
        function(qkv, regions, shape.heads, **layout).backward(grad)

    return step


def block(way: str, shape: Shape) -> Callable[[], None]:
    """A forward and a backward pass of a block, for gradients of its input and parameters."""
    attention = partial(
        layers.BiLevelRoutingAttention, num_heads=shape.heads, n_win=SIDES, topk=shape.topk
    )
    module = RoutingBlock(shape.channels, attention, mlp_ratio=3)
    x = torch.randn(BATCH, shape.side, shape.side, shape.channels, requires_grad=True)
    grad = torch.randn_like(x)

    def step() -> None:
        with WAYS[way][1]():
            module(x).backward(grad)

    return step


def measure(part: Callable[[str, Shape], Callable[[], None]], shape: Shape) -> Row:
    """Compare all ways of one shape."""
    torch.manual_seed(0)
    peaks = {way: peak(part(way, shape)) for way in WAYS}
    row: Row = {"part": part.__name__, "batch": BATCH, **shape._asdict()}
    row |= {f"{way}_mib": round(value, 1) for way, value in peaks.items()}
    return row | {f"{way}_share": round(peaks[way] / peaks["gather"], 3) for way in WAYS}


def measure_all(seconds: float) -> Iterator[Row]:
    """Compare all shapes, attention alone and in a block; nothing is timed."""
    for part in (core, block):
        for shape in SHAPES:
            yield measure(part, shape)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return run(measure_all, RESULT, argv, __doc__.splitlines()[0], 0.0)


if __name__ == "__main__":
    sys.exit(main())
