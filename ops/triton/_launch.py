"""What the launchers share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# where there is no GPU to ask: the interpreter, and compilation ahead of time
_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile of scores, and how a program works on it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 2

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }

    def doubled(self) -> Tile:
        """The same tile for twice the warps, and nothing fetched ahead: fewer registers each."""
        return replace(self, num_warps=2 * self.num_warps, num_stages=1)


def multiprocessors(tensor: Tensor) -> int:
    """Multiprocessors of the device of `tensor`."""
    if not tensor.is_cuda:
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def input_precision(tensor: Tensor) -> str:
    """How `tl.dot` is to multiply float32, by PyTorch's own setting."""
    exact = torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact or tensor.dtype != torch.float32 else "tf32"


def rows_contiguous(x: Tensor) -> Tensor:
    """Return `x`, or a copy if the stride of its last dimension is not one."""
    return x if x.stride(-1) == 1 else x.contiguous()


def cdiv(a: int, b: int) -> int:
    """Divide, rounding up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
