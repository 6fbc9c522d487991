"""What `partial_attention` is compared with."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.partial_attention import PartialCase

from ._peer import Compile, CompiledReference, Peer, Peers, Reference


class PartialSdpa(Reference):
    """PyTorch's fused attention, then concatenation and ReLU."""

    def __init__(self, case: PartialCase, compile: Compile) -> None:
        super().__init__(case, compile)
        self.function = partial(_partial_sdpa, qk_dim=case.qk_dim)


def _partial_sdpa(qkv: Tensor, x: Tensor, qk_dim: int) -> Tensor:
    values = qkv.shape[-1] - 2 * qk_dim
    q, k, v = qkv.flatten(1, 2)[:, None].split([qk_dim, qk_dim, values], dim=-1)
    attended = F.scaled_dot_product_attention(q, k, v)[:, 0].unflatten(1, x.shape[1:3])
    return torch.cat([attended, x[..., values:]], dim=-1).relu()


PEERS: Peers = {
    "backbones": Peer,
    "reference": Reference,
    "sdpa": PartialSdpa,
    "reference compiled": CompiledReference,
}
