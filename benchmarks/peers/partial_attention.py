"""What `partial_attention` is compared with.

All peers start from the packed queries, keys and values, as the op does: the normalisation and the
convolution before them and the one after the ReLU are left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases.partial_attention import PartialCase

from ._peer import Compile, CompiledReference, Given, Outputs, Peer, Peers

# PyTorch's fused attention takes heads of a multiple of this
_HEAD_ALIGN = 8


class Timm(Peer):
    """timm's attention, which follows the official code, on channels-last maps."""

    def __init__(self, case: PartialCase, compile: Compile) -> None:
        from timm.models.shvit import SHSA

        super().__init__(case, compile)
        self.attention = SHSA(case.channels, case.qk_dim, case.values)
        self.attention.pre_norm, self.attention.qkv = nn.Identity(), Given()
        # the ReLU stays, the convolution goes
        self.attention.proj[1] = nn.Identity()
        self.function = self._function

    def _function(self, qkv: Tensor, x: Tensor) -> Tensor:
        self.attention.qkv.value = qkv.permute(0, 3, 1, 2)
        return self.attention(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class CompiledTimm(Timm):
    """timm's attention under `torch.compile`."""

    def __init__(self, case: PartialCase, compile: Compile) -> None:
        super().__init__(case, compile)
        self.function = compile(self._function)


class Sdpa(Peer):
    """PyTorch's fused attention, then concatenation and ReLU.

    Its fast kernels want one width for queries and values: `padded` fills all up with zeros.
    """

    padded = False

    def __init__(self, case: PartialCase, compile: Compile) -> None:
        super().__init__(case, compile)
        self.case = case

    def run(self, *arguments: Tensor) -> Outputs:
        """Attend, join, cut off below zero."""
        (qkv, x), case = arguments, self.case
        tokens = qkv.flatten(1, 2)[:, None]
        q, k, v = tokens.split([case.qk_dim, case.qk_dim, case.values], dim=-1)
        if self.padded:
            width = -(-max(case.qk_dim, case.values) // _HEAD_ALIGN) * _HEAD_ALIGN
            q, k, v = (F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=case.qk_dim**-0.5)
        attended = out[:, 0, :, : case.values].unflatten(1, x.shape[1:3])
        return (torch.cat([attended, x[..., case.values :]], dim=-1).relu(),)


class PaddedSdpa(Sdpa):
    """The same with queries, keys and values of one width."""

    padded = True


PEERS: Peers = {
    "backbones": Peer,
    "timm": Timm,
    "sdpa": Sdpa,
    "sdpa padded": PaddedSdpa,
    "timm compiled": CompiledTimm,
    "reference compiled": CompiledReference,
}
