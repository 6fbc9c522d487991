"""What the two forms of dynamic mixing share: one half of a call, with one kernel size.

A form is a module with the functions `forward` and `backward` of `_mixing_class.py`; each computes
one half: the output's channels of that half, its logsumexp and its part of the gradients. All maps
are channels last; the channels of a tensor it reads have stride one, and what it writes is
contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._launch import input_precision, next_power_of_2


@dataclass(frozen=True)
class Half:
    """One half of a call of `dynamic_mixing`.

    Attributes:
        query: Queries `(B, H, W, C / 2)`, head by head.
        kernel: Generated kernels `(B, G, D, S)` of both halves.
        value: Values `(B, H, W, C)` of both halves.
        bias: Bias `(S,)` of the slots of both halves, float32, contiguous.
        table: Relative position bias `(G, 2K - 1, 2K - 1)` of this half, float32, contiguous.
        size: Rows, and columns, K of a window.
        slot: The first slot of this half, of kernels and bias.
        channel: The first channel of this half, of values and output.
    """

    query: Tensor
    kernel: Tensor
    value: Tensor
    bias: Tensor
    table: Tensor
    size: int
    slot: int
    channel: int

    @property
    def batch(self) -> int:
        """Images B."""
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        """Heads G."""
        return self.kernel.shape[1]

    @property
    def dim(self) -> int:
        """Channels D of a head."""
        return self.kernel.shape[2]

    @property
    def height(self) -> int:
        """Rows of the map."""
        return self.query.shape[1]

    @property
    def width(self) -> int:
        """Columns of the map."""
        return self.query.shape[2]

    @property
    def wide(self) -> bool:
        """Whether numbers take 32 bits, and tiles twice the registers."""
        return self.query.dtype == torch.float32

    @property
    def windows(self) -> tuple[int, int]:
        """Rows and columns of distinct windows."""
        return self.height - self.size + 1, self.width - self.size + 1

    @property
    def strides(self) -> tuple[int, ...]:
        """Of images, rows and columns of queries; images, heads and channels of kernels; values."""
        return *self.query.stride()[:3], *self.kernel.stride()[:3], *self.value.stride()[:3]

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments that every kernel wants."""
        return {
            "D": self.dim,
            "K": self.size,
            "BLOCK_D": max(16, next_power_of_2(self.dim)),
            "PRECISION": input_precision(self.query),
        }
