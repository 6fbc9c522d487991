"""What `dynamic_mixing` is compared with.

NATTEN, whose `na2d_av` the official code calls, dropped that function in 0.20, and 0.17 builds with
no current PyTorch: it cannot be run. All peers start from queries, generated kernels and values, as
the op does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backbones.ops._neighborhood import own_slots, window_starts
from benchmarks.cases import Tensors
from benchmarks.cases.dynamic_mixing import MixingCase

from ._peer import Compile, CompiledReference, Peer, Peers


def unfold_windows(value: Tensor, size: int) -> Tensor:
    """Copy the window of every pixel of `(B, N, H, W)`: `(B, N, H, W, K * K)`.

    Windows inside the map are unfolded, and those of the border repeated.
    """
    height, width = value.shape[2:]
    windows = value.unfold(2, size, 1).unfold(3, size, 1)
    rows, cols = (window_starts(n, size, device=value.device) for n in (height, width))
    return windows[:, :, rows[:, None], cols].flatten(4)


class Unfolded(Peer):
    """The official code without NATTEN, on planes as there; written for this benchmark.

    Logits are written, softmax is in float32, and every window is copied. Types are those of
    autocast. The logits are those of the generated kernels; the official way, by a score for each
    of 49 regions, has 3 times the products and is not charged.
    """

    def __init__(self, case: MixingCase, compile: Compile) -> None:
        super().__init__(case, compile)
        self.heads, self.function = case.heads, self._function

    def prepare(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """Put channels first."""
        planes = {
            name: tensors[name].permute(0, 3, 1, 2).contiguous() for name in ("query", "value")
        }
        return tuple({**tensors, **planes}.values())

    def to_map(self, result: Tensor) -> Tensor:
        """Put channels last."""
        return result.permute(0, 2, 3, 1)

    def _function(
        self,
        query: Tensor,
        kernel: Tensor,
        value: Tensor,
        bias: Tensor,
        table_small: Tensor,
        table_large: Tensor,
    ) -> Tensor:
        tables = (table_small, table_large)
        slots = [((table.shape[-1] + 1) // 2) ** 2 for table in tables]
        queries = query.flatten(2).unflatten(1, (self.heads, -1))
        logits = (queries.mT @ kernel + bias.to(kernel.dtype)).split(slots, -1)
        halves = zip(logits, tables, value.chunk(2, 1), strict=True)
        return torch.cat([self._mix(*half) for half in halves], 1)

    def _mix(self, logits: Tensor, table: Tensor, value: Tensor) -> Tensor:
        size, (height, width) = (table.shape[-1] + 1) // 2, value.shape[2:]
        slots = torch.arange(size, device=value.device)
        rows, cols = (
            slots - own_slots(n, size, device=value.device)[:, None] + size - 1
            for n in (height, width)
        )
        position = table[:, rows[:, None, :, None], cols[None, :, None, :]]
        logits = logits.unflatten(2, (height, width)) + position.flatten(3)
        weights = logits.softmax(dim=-1).to(value.dtype)
        windows = unfold_windows(value, size).unflatten(1, (self.heads, -1))
        return torch.einsum("bghwk,bgdhwk->bgdhw", weights, windows).flatten(1, 2)


class CompiledUnfolded(Unfolded):
    """The same under `torch.compile`."""

    def __init__(self, case: MixingCase, compile: Compile) -> None:
        super().__init__(case, compile)
        self.function = compile(self._function)


PEERS: Peers = {
    "backbones": Peer,
    "unfold": Unfolded,
    "unfold compiled": CompiledUnfolded,
    "reference compiled": CompiledReference,
}
