"""What `linear_attention` is compared with.

All peers start from the packed queries, keys and values, as the op does: the projections before and
after are left out.
"""

from __future__ import annotations

from torch import Tensor

from benchmarks.cases.linear_attention import LinearCase

from ._peer import Compile, CompiledReference, Peer, Peers


class Official(Peer):
    """The operations of the official code, in their order, written for this benchmark.

    Sums and denominators are computed in the type of the map, as the official code would under
    autocast; float16 does not hold those of large maps.
    """

    def __init__(self, case: LinearCase, compile: Compile) -> None:
        super().__init__(case, compile)
        self.heads, self.function = case.heads, self._function

    def _function(self, qkv: Tensor, temperature: Tensor) -> Tensor:
        tokens = qkv.flatten(1, 2).unflatten(-1, (3, self.heads, -1))
        q, k, v = tokens.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = q.relu(), k.relu()
        den = (q @ k.sum(dim=-2, keepdim=True).mT).clamp(min=1e2)
        kv = k.mT @ v * temperature.to(q.dtype)[:, None, None]
        return (q @ kv / den).transpose(1, 2).reshape(*qkv.shape[:3], -1)


class CompiledOfficial(Official):
    """The same under `torch.compile`."""

    def __init__(self, case: LinearCase, compile: Compile) -> None:
        super().__init__(case, compile)
        self.function = compile(self.function)


PEERS: Peers = {
    "backbones": Peer,
    "official": Official,
    "official compiled": CompiledOfficial,
    "reference compiled": CompiledReference,
}
