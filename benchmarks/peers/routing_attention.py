"""What `routing_attention` is compared with.

All peers start from the packed queries, keys and values and from the chosen regions, as the op
does. Of a map that the regions do not fill they get one that is filled already, which is what the
official code projects; nobody is charged for that copy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops._regions import Regions, inside, merge, pad_tokens, partition
from benchmarks.cases import Tensors
from benchmarks.cases.routing_attention import HEAD_DIM, RoutingCase

from ._peer import Compile, CompiledReference, Outputs, Peer, Peers

# a mask of all pairs of tokens may take so many bytes
_MASK_BYTES = 1 << 29


def expanded_attention(regions_qkv: Tensor, chosen: Tensor, heads: int) -> Tensor:
    """Attend as the official code does: keys and values gathered from an expanded view.

    Its backward pass holds R copies of all keys and values.

    Args:
        regions_qkv: Packed tokens by region `(B, R, t, 3C)`.
        chosen: Chosen regions `(B, R, K)`.
        heads: Number of heads.

    Returns:
        Tokens `(B, R, t, C)`.
    """
    (batch, count, tokens, packed), topk = regions_qkv.shape, chosen.shape[-1]
    channels = packed // 3
    pairs = regions_qkv[..., channels:]
    pairs = torch.gather(
        pairs[:, None].expand(-1, count, -1, -1, -1),
        2,
        chosen[..., None, None].expand(-1, -1, -1, tokens, 2 * channels),
    )

    def split(part: Tensor) -> Tensor:
        return part.reshape(batch * count, -1, heads, channels // heads).transpose(1, 2)

    q = split(regions_qkv[..., :channels])
    k, v = (split(part) for part in pairs.reshape(batch, count, topk * tokens, -1).chunk(2, -1))
    weights = (q * channels**-0.5 @ k.transpose(-1, -2)).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).reshape(batch, count, tokens, channels)


class Expanded(Peer):
    """The official gather, with the copies into regions and back."""

    def __init__(self, case: RoutingCase, compile: Compile) -> None:
        super().__init__(case, compile)
        self.case, self.at = case, Regions(*case.num_regions, *case.region_size)
        self.chosen = case.regions()
        self.function = self._function

    def prepare(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """Make the packed map that the regions fill."""
        qkv, pad = tensors["qkv"], tensors.get("pad")
        tokens = pad_tokens(partition(qkv, self.at), inside(qkv, self.at), pad)
        return (self._join(tokens),)

    def _join(self, tokens: Tensor) -> Tensor:
        return merge(tokens, self.at, *self._filled)

    @property
    def _filled(self) -> tuple[int, int]:
        return self.at.rows * self.at.height, self.at.cols * self.at.width

    def _function(self, qkv: Tensor) -> Tensor:
        out = expanded_attention(partition(qkv, self.at), self.chosen, self.case.heads)
        return self._join(out)

    def run(self, *arguments: Tensor) -> Outputs:
        """Cut the map, attend, join."""
        return (self.function(*arguments),)

    def to_map(self, result: Tensor) -> Tensor:
        """Crop the map."""
        return result[:, : self.case.height, : self.case.width]


class CompiledExpanded(Expanded):
    """The official gather under `torch.compile`."""

    def __init__(self, case: RoutingCase, compile: Compile) -> None:
        super().__init__(case, compile)
        self.function = compile(self._function)


class Sdpa(Expanded):
    """PyTorch's fused attention of all tokens, region by region already, under a mask."""

    def __init__(self, case: RoutingCase, compile: Compile) -> None:
        super().__init__(case, compile)
        if case.batch * (self.at.regions * self.at.tokens) ** 2 > _MASK_BYTES:
            raise NotImplementedError("a mask of all pairs of tokens does not fit")

    def prepare(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """Make q, k, v `(B, heads, R * t, D)`."""
        (qkv,) = super().prepare(tensors)
        tokens = partition(qkv, self.at).flatten(1, 2).unflatten(-1, (3, -1, HEAD_DIM))
        return tuple(part.contiguous() for part in tokens.permute(2, 0, 3, 1, 4))

    def run(self, *arguments: Tensor) -> Outputs:
        """Make the mask, attend."""
        q, k, v = arguments
        count = self.at.regions
        chosen = torch.zeros(len(q), count, count, dtype=torch.bool, device=q.device)
        chosen.scatter_(2, self.chosen, True)
        mask = chosen.repeat_interleave(self.at.tokens, 1).repeat_interleave(self.at.tokens, 2)
        scale = self.case.channels**-0.5
        return (F.scaled_dot_product_attention(q, k, v, mask[:, None], scale=scale),)

    def to_map(self, result: Tensor) -> Tensor:
        """Join heads and regions, and crop the map."""
        tokens = result.transpose(1, 2).flatten(2).unflatten(1, (self.at.regions, -1))
        return super().to_map(self._join(tokens))


PEERS: Peers = {
    "backbones": Peer,
    "gather": Expanded,
    "sdpa masked core": Sdpa,
    "gather compiled": CompiledExpanded,
    "reference compiled": CompiledReference,
}
