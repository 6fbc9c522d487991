"""What `rank_augmented_attention` is compared with.

All peers start from the packed queries, keys, values and gate and from what is added, as the op
does: the projections, and the convolution that makes the addend, are left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.rank_augmented_attention import RankAugmentedCase

from ._peer import Compile, CompiledReference, Peer, Peers


class Official(Peer):
    """The operations of the official code, in their order, written for this benchmark.

    Keys are multiplied by the number of tokens times their weight, and sums divided by it; sine and
    cosine are tables of every channel of every token. Types are those of autocast.
    """

    def __init__(self, case: RankAugmentedCase, compile: Compile) -> None:
        super().__init__(case, compile)
        self.case, self.function = case, self._function
        cos, sin = case.rotary()
        size = (case.height, case.width, -1)
        self.cos, self.sin = (
            torch.cat([x[: size[0], None].expand(size), x[None, : size[1]].expand(size)], dim=-1)
            .flatten(0, 1)
            .repeat_interleave(2, dim=-1)
            for x in (cos, sin)
        )

    def _turn(self, x: Tensor) -> Tensor:
        crossed = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return x * self.cos + crossed * self.sin

    def _function(self, qkv: Tensor, addend: Tensor) -> Tensor:
        tokens = qkv.flatten(1, 2).unflatten(-1, (4, self.case.heads, -1))
        q, k, v, gate = tokens.permute(2, 0, 3, 1, 4).unbind(0)
        count, scale = q.shape[-2], q.shape[-1] ** -0.5
        q, k = F.elu(q) + 1, F.elu(k) + 1
        scores = q.mean(dim=-2, keepdim=True) @ k.mT * scale
        k = k * (scores.float().softmax(dim=-1) * count).mT
        inverse = 1 / (q @ k.mean(dim=-2, keepdim=True).mT.to(q.dtype) + 1e-6)
        turned_q, turned_k = (self._turn(x).to(q.dtype) for x in (q, k))
        kv = (turned_k.mT * count**-0.5) @ (v * count**-0.5)
        core = (turned_q @ kv * inverse).transpose(1, 2).reshape(addend.shape)
        return (core + addend) * gate.transpose(1, 2).reshape(addend.shape)


class CompiledOfficial(Official):
    """The same under `torch.compile`."""

    def __init__(self, case: RankAugmentedCase, compile: Compile) -> None:
        super().__init__(case, compile)
        self.function = compile(self._function)


PEERS: Peers = {
    "backbones": Peer,
    "official": Official,
    "official compiled": CompiledOfficial,
    "reference compiled": CompiledReference,
}
