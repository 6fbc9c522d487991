"""What `channel_attention` is compared with.

"bmm" are the batched products that timm's eager code makes of q, k and v, in their own type. "sdpa"
is PyTorch's fused attention on transposed maps: channels as tokens, tokens as channels.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.channel_attention import ChannelCase

from ._peer import Compile, CompiledReference, Peer, Peers, Reference


def _columns(qkv: Tensor, heads: int, mix_values: bool) -> tuple[tuple[Tensor, ...], float]:
    """What makes rows and columns of the scores and what is mixed `(B, heads, D, N)`; the scale."""
    tokens = qkv.flatten(1, 2).unflatten(-1, (3, heads, -1))
    q, k, v = tokens.permute(2, 0, 3, 4, 1).unbind(0)
    if mix_values:
        return (q, k, v), q.shape[-1] ** -0.5
    return (k, v, q), q.shape[-2] ** -0.5


def _bmm(qkv: Tensor, heads: int, mix_values: bool) -> Tensor:
    (a, b, m), scale = _columns(qkv, heads, mix_values)
    weights = (a * scale @ b.transpose(-1, -2)).softmax(dim=-1)
    return (weights @ m).flatten(1, 2).transpose(1, 2).reshape(*qkv.shape[:3], -1)


def _sdpa(qkv: Tensor, heads: int, mix_values: bool) -> Tensor:
    (a, b, m), scale = _columns(qkv, heads, mix_values)
    out = F.scaled_dot_product_attention(a, b, m, scale=scale)
    return out.flatten(1, 2).transpose(1, 2).reshape(*qkv.shape[:3], -1)


class Bmm(Peer):
    """Batched matrix products."""

    def __init__(self, case: ChannelCase, compile: Compile) -> None:
        super().__init__(case, compile)
        self.function = partial(_bmm, heads=case.heads, mix_values=case.mix_values)


class CompiledBmm(Bmm):
    """Batched matrix products under `torch.compile`."""

    def __init__(self, case: ChannelCase, compile: Compile) -> None:
        super().__init__(case, compile)
        self.function = compile(self.function)


class Sdpa(Peer):
    """PyTorch's fused attention on transposed maps."""

    def __init__(self, case: ChannelCase, compile: Compile) -> None:
        super().__init__(case, compile)
        self.function = partial(_sdpa, heads=case.heads, mix_values=case.mix_values)


PEERS: Peers = {
    "backbones": Peer,
    "reference": Reference,
    "bmm": Bmm,
    "sdpa": Sdpa,
    "bmm compiled": CompiledBmm,
    "reference compiled": CompiledReference,
}
