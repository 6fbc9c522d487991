"""Which of two implementations of a depthwise convolution a GPU runs: ours or PyTorch's.

`depthwise_table.json` holds what `benchmarks/ops.py` measured, as speed-ups of ours over PyTorch's,
by architecture; `benchmarks/depthwise_table.py` writes it. What nobody has measured PyTorch runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from math import log2
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import _depthwise_pytorch
from ._common import kernels

TABLE = Path(__file__).with_name("depthwise_table.json")
# kernels from this size on are ours on matrix units
MATRICES = 11
_forced: bool | None = None


class Work(NamedTuple):
    """One pass over a map: what the choice depends on.

    Attributes:
        part: "forward", "norm" (with a LayerNorm), "norm_backward" (of the LayerNorm alone),
            "grad_input" or "grad_weight".
        dtype: Type of the map, without "torch.".
        kernel: Rows of the kernel.
        stride: Of the convolution.
        pixels: Of the input, over the batch.
        channels: Of the input.
    """

    part: str
    dtype: str
    kernel: int
    stride: int
    pixels: int
    channels: int


class Measured(NamedTuple):
    """A row of the table: how many times faster ours was."""

    work: Work
    speedup: float


@cache
def read_table() -> dict[str, tuple[Measured, ...]]:
    """Rows of `depthwise_table.json` by architecture, such as "sm_90"."""
    archs = json.loads(TABLE.read_text())["archs"]
    return {
        arch: tuple(Measured(Work(*row[:-1]), row[-1]) for row in rows)
        for arch, rows in archs.items()
    }


def ours_is_faster(work: Work, rows: Sequence[Measured]) -> bool:
    """Decide by the measured row whose size is nearest, in octaves; False if there is none.

    Args:
        work: What is to be computed.
        rows: What was measured on the architecture.
    """

    def distance(row: Measured) -> float:
        sizes = zip(row.work[4:], work[4:], strict=True)
        return sum(abs(log2(max(1, int(a)) / max(1, int(b)))) for a, b in sizes)

    alike = [row for row in rows if row.work[:4] == work[:4]]
    return bool(alike) and min(alike, key=distance).speedup > 1


@lru_cache(maxsize=4096)
def _decide(work: Work, major: int, minor: int) -> bool:
    return ours_is_faster(work, read_table().get(f"sm_{major}{minor}", ()))


@contextmanager
def forced(ours: bool) -> Iterator[None]:
    """Choose the same for every call inside a `with` block, for tests and benchmarks."""
    global _forced
    previous, _forced = _forced, ours
    try:
        yield
    finally:
        _forced = previous


def _chosen(part: str, x: Tensor, kernel: int, stride: int) -> bool:
    # the matrix units that Triton reaches have no float64 on most devices, and take float32 in so
    # many products that large kernels of it spill their registers
    if x.dtype == torch.float64 or (x.dtype == torch.float32 and kernel >= MATRICES):
        return False
    if _forced is not None:
        return _forced
    if not x.is_cuda or torch.version.hip is not None:
        return False
    major, minor = torch.cuda.get_device_capability(x.device)
    dtype = str(x.dtype).removeprefix("torch.")
    return _decide(Work(part, dtype, kernel, stride, x.shape[:3].numel(), x.shape[3]), major, minor)


def implementation(part: str, x: Tensor, kernel: int, stride: int) -> ModuleType:
    """The module that is to compute `part` of a map `x` `(B, H, W, C)`; see `Work`."""
    if _chosen(part, x, kernel, stride):
        return kernels("depthwise_conv", x)
    return _depthwise_pytorch
