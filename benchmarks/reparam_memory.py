"""Compare what OverLoCK's large kernels take to train on a CPU: merged, and one by one.

    python benchmarks/reparam_memory.py            a table
    python benchmarks/reparam_memory.py --write    also benchmarks/results/reparam_memory.json

A pass is forward and backward, for gradients of the map and all parameters. "merged" is our layer,
which keeps none of its convolutions; "planes" and "channels_last" are the convolutions and norms of
the official code, in either layout. Memory is on top of inputs and parameters, in MiB: the peak of
a pass, and what is kept from forward to backward, which adds up over the layers of a network. Times
are ratios, to that of "planes", of the best of many in turns.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from backbones.layers import DilatedReparamConv
from benchmarks._cpu import Row, best_times, peak, run

RESULT = Path(__file__).resolve().parent / "results" / "reparam_memory.json"
BASE = "planes"


class Shape(NamedTuple):
    """A batch of square maps of a stage of overlock_xt, and its kernel."""

    batch: int
    channels: int
    side: int
    kernel: int


STAGES = [(56, 56, 17), (112, 28, 15), (256, 14, 13), (336, 7, 7)]
# what a convolution takes beside its maps does not grow with the batch, and hides small ones
SHAPES = [Shape(batch, *stage) for batch in (8, 64) for stage in STAGES if batch * stage[1] < 1000]


class OneByOne(nn.Module):
    """The convolutions and norms of a layer, each called, and their sum."""

    def __init__(self, layer: DilatedReparamConv) -> None:
        super().__init__()
        self.units = nn.ModuleList(
            nn.Sequential(unit.conv, unit.bn) for unit in (layer, *layer.branches)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, C, H, W)`."""
        out = self.units[0](x)
        for unit in self.units[1:]:
            out = out + unit(x)
        return out


class Way:
    """A way to compute a layer.

    Args:
        module: Computes it.
        x: Its input.
        grad: Gradient of its output.
    """

    def __init__(self, module: nn.Module, x: Tensor, grad: Tensor) -> None:
        self.module, self.x, self.grad = module, x.requires_grad_(), grad

    def __call__(self) -> None:
        """Run a forward and a backward pass."""
        self.x.grad = None
        self.module.zero_grad(set_to_none=True)
        self.module(self.x).backward(self.grad)

    def kept(self) -> float:
        """MiB that a forward pass leaves for the backward pass."""
        given = {t.data_ptr() for t in (self.x, *self.module.parameters(), *self.module.buffers())}
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in given:
                found[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            # alive until the sum: what is freed may come again at the same place
            out = self.module(self.x)
        total = sum(found.values())
        del out
        return total / 2**20


def ways_of(shape: Shape) -> dict[str, Way]:
    """All ways."""
    torch.manual_seed(0)
    size = (shape.batch, shape.side, shape.side, shape.channels)
    x, grad = torch.randn(size), torch.randn(size)
    planes, grad_planes = (t.permute(0, 3, 1, 2) for t in (x, grad))
    layer = DilatedReparamConv(shape.channels, shape.kernel)
    return {
        "merged": Way(layer, x.clone(), grad),
        "planes": Way(OneByOne(layer), planes.contiguous(), grad_planes.contiguous()),
        "channels_last": Way(OneByOne(layer), planes.clone(), grad_planes),
    }


def measure(shape: Shape, seconds: float) -> Row:
    """Compare all ways of one shape."""
    ways = ways_of(shape)
    times = best_times(ways, seconds)
    row: Row = shape._asdict()
    for name, way in ways.items():
        row[f"{name}_peak_mib"], row[f"{name}_kept_mib"] = round(peak(way), 1), round(way.kept(), 1)
        row[f"{name}_time"] = round(times[name] / times[BASE], 2)
    return row


def measure_all(seconds: float) -> Iterator[Row]:
    """Compare all shapes."""
    for shape in SHAPES:
        yield measure(shape, seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return run(measure_all, RESULT, argv, __doc__.splitlines()[0], 8.0)


if __name__ == "__main__":
    sys.exit(main())
