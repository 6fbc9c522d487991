"""What `channel_attention` is compared with.

All peers start from the packed queries, keys and values, as the op does: the projections before and
after are left out.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases.channel_attention import ChannelCase

from ._peer import Compile, CompiledReference, Given, Peer, Peers


class Timm(Peer):
    """timm's attention."""

    def __init__(self, case: ChannelCase, compile: Compile) -> None:
        from timm.models.davit import ChannelAttention, ChannelAttentionV2

        super().__init__(case, compile)
        layer = ChannelAttentionV2 if case.mix_values else ChannelAttention
        self.attention = layer(case.channels, case.heads)
        self.attention.qkv, self.attention.proj = Given(), nn.Identity()
        self.channels = case.channels
        self.function = self._function

    def _function(self, qkv: Tensor) -> Tensor:
        tokens = qkv.flatten(1, 2)
        self.attention.qkv.value = tokens
        # of what it would project it takes the shape only
        return self.attention(tokens[..., : self.channels]).unflatten(1, qkv.shape[1:3])


class CompiledTimm(Timm):
    """timm's attention under `torch.compile`."""

    def __init__(self, case: ChannelCase, compile: Compile) -> None:
        super().__init__(case, compile)
        self.function = compile(self._function)


class Sdpa(Peer):
    """PyTorch's fused attention on transposed maps: channels as tokens, tokens as channels."""

    def __init__(self, case: ChannelCase, compile: Compile) -> None:
        super().__init__(case, compile)
        self.case = case
        self.function = self._function

    def _function(self, qkv: Tensor) -> Tensor:
        tokens = qkv.flatten(1, 2).unflatten(-1, (3, self.case.heads, -1))
        q, k, v = tokens.permute(2, 0, 3, 4, 1).unbind(0)
        if self.case.mix_values:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = F.scaled_dot_product_attention(k, v, q, scale=q.shape[-2] ** -0.5)
        return out.flatten(1, 2).transpose(1, 2).reshape(*qkv.shape[:3], -1)


PEERS: Peers = {
    "backbones": Peer,
    "timm": Timm,
    "sdpa": Sdpa,
    "timm compiled": CompiledTimm,
    "reference compiled": CompiledReference,
}
