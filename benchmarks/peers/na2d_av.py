"""What `na2d_av` is compared with.

NATTEN itself is not installable: the function was removed in 0.20, and 0.17 builds with no current
PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases.na2d_av import WindowSumCase

from ._peer import Compile, CompiledReference, Peer, Peers
from .dynamic_mixing import unfold_windows


class Unfolded(Peer):
    """What OverLoCK's `ContMixBlock` does without NATTEN: every window is copied, on planes."""

    def __init__(self, case: WindowSumCase, compile: Compile) -> None:
        super().__init__(case, compile)
        self.size, self.function = case.size, self._function

    def prepare(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Put the channels of values before their rows."""
        return tensors["attn"], tensors["value"].movedim(-1, 2).contiguous()

    def to_map(self, result: Tensor) -> Tensor:
        """Put them last."""
        return result.movedim(2, -1)

    def _function(self, attn: Tensor, value: Tensor) -> Tensor:
        windows = unfold_windows(value.flatten(1, 2), self.size)
        windows = windows.unflatten(1, value.shape[1:3])
        return torch.einsum("bghwk,bgdhwk->bgdhw", attn, windows)


class CompiledUnfolded(Unfolded):
    """The same under `torch.compile`."""

    def __init__(self, case: WindowSumCase, compile: Compile) -> None:
        super().__init__(case, compile)
        self.function = compile(self._function)


PEERS: Peers = {
    "backbones": Peer,
    "unfold": Unfolded,
    "unfold compiled": CompiledUnfolded,
    "reference compiled": CompiledReference,
}
