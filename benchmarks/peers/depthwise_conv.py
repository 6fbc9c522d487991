"""What the depthwise convolutions are compared with.

"backbones" are our kernels and "pytorch" is what the op calls instead where
`ops/depthwise_table.json` says so: both pay for the op itself. "conv2d nchw" has its tensors as
planes, as most code has, and no copy is charged to it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.cases import Tensors

from ._peer import CompiledReference, Outputs, Peer, Peers, Reference


class Chosen(Peer):
    """The op, with the implementation chosen by us instead of the table."""

    ours: ClassVar[bool]

    def scope(self) -> AbstractContextManager[None]:
        """Choose, for forward and backward passes alike."""
        from backbones.ops import _choice

        # PyTorch on a CPU: there our kernels would run in the interpreter
        return _choice.forced(self.ours and torch.cuda.is_available())


class Ours(Chosen):
    """Our kernels."""

    ours = True


class PyTorch(Chosen):
    """PyTorch's convolution on channels-last maps, and one kernel for each step around it."""

    ours = False


class Planes(Reference):
    """PyTorch's convolution and the steps around it on planes `(B, C, H, W)`."""

    def prepare(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """Make planes of the maps."""
        return tuple(
            t.permute(0, 3, 1, 2).contiguous() if name in ("x", "addend") else t
            for name, t in tensors.items()
        )

    def run(self, *arguments: Tensor) -> Outputs:
        """Compute on views of the planes, which PyTorch then sees as such."""
        maps = (
            t.permute(0, 2, 3, 1) if name in ("x", "addend") else t
            for name, t in zip(self.names, arguments, strict=True)
        )
        return super().run(*maps)


PEERS: Peers = {
    "backbones": Ours,
    "pytorch": PyTorch,
    "conv2d nchw": Planes,
    "reference compiled": CompiledReference,
}
