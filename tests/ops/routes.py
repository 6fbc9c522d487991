"""Calls of routing attention that the tests share, and the op written out token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backbones.ops import routing_attention
from tests.support import golden


@dataclass(frozen=True)
class Call:
    """One call on a map `(batch, height, width)`."""

    name: str
    map_size: tuple[int, int, int]
    num_regions: tuple[int, int]
    region_size: tuple[int, int]
    topk: int = 2
    heads: int = 2
    dim: int = 16
    pad: bool = False

    @property
    def count(self) -> int:
        """Regions of the map."""
        return self.num_regions[0] * self.num_regions[1]

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the op that are not tensors."""
        return {
            "num_heads": self.heads,
            "num_regions": self.num_regions,
            "region_size": self.region_size,
        }

    def inputs(self) -> list[Tensor | None]:
        """Leaves qkv and pad, float64; None for what the call leaves out."""
        channels = 3 * self.heads * self.dim
        shapes = {"qkv": (*self.map_size, channels), "pad": (channels,) if self.pad else None}
        return [
            None if shape is None else torch.from_numpy(golden.normal(name, shape)).requires_grad_()
            for name, shape in shapes.items()
        ]

    def regions(self) -> Tensor:
        """Choices `(B, R, K)`: region 0 is in all of them, and some regions in none."""
        numbers = torch.from_numpy(golden.normal("regions", (self.map_size[0], self.count, 64)))
        numbers = numbers[..., : self.count]
        # a few that nobody takes, as far as there are enough others
        numbers[..., self.topk + (self.count - self.topk) // 2 :] -= 100
        numbers[..., 0] += 100
        return numbers.argsort(dim=-1, descending=True)[..., : self.topk]

    def weight(self) -> Tensor:
        """What the output is multiplied by, to take gradients."""
        return torch.from_numpy(golden.normal("weight", (*self.map_size, self.heads * self.dim)))

    def __call__(self, qkv: Tensor, pad: Tensor | None) -> Tensor:
        """Call the op."""
        regions = self.regions().to(qkv.device)
        return routing_attention(qkv, regions, pad=pad, **self.options)


# maps that the regions fill and do not fill, regions outside the map, all regions chosen
CALLS = [
    Call("filled", (2, 6, 8), (3, 2), (2, 4)),
    Call("all regions", (1, 4, 6), (2, 2), (2, 3), topk=4),
    Call("one region", (1, 3, 2), (1, 1), (3, 2), topk=1),
    Call("zeros", (2, 5, 7), (3, 3), (2, 3), topk=3),
    Call("padded", (2, 5, 7), (3, 3), (2, 3), topk=3, pad=True),
    Call("empty regions", (1, 5, 5), (4, 4), (2, 2), topk=5),
    Call("empty padded regions", (1, 5, 5), (4, 4), (2, 2), topk=5, pad=True),
    Call("one token", (1, 3, 4), (3, 4), (1, 1), topk=7),
    Call("less than a region", (1, 2, 3), (2, 2), (3, 4), pad=True),
]


def by_hand(call: Call, qkv: Tensor, pad: Tensor | None) -> Tensor:
    """The op token by token, from its definition, in float64."""
    (batch, height, width), (h, w) = call.map_size, call.region_size
    out = torch.zeros(batch, height, width, call.heads * call.dim, dtype=qkv.dtype)
    outside = torch.zeros_like(qkv[0, 0, 0]) if pad is None else pad
    regions = call.regions()

    def part(token: Tensor, head: int, index: int) -> Tensor:
        return token.view(3, call.heads, call.dim)[index, head]

    for n, y, x, head in (
        (n, y, x, head)
        for n in range(batch)
        for y in range(height)
        for x in range(width)
        for head in range(call.heads)
    ):
        tokens = []
        for region in regions[n, y // h * call.num_regions[1] + x // w].tolist():
            row, col = divmod(region, call.num_regions[1])
            tokens += [
                qkv[n, ky, kx] if ky < height and kx < width else outside
                for ky in range(row * h, row * h + h)
                for kx in range(col * w, col * w + w)
            ]
        query = part(qkv[n, y, x], head, 0)
        scores = torch.stack([query @ part(token, head, 1) for token in tokens])
        weights = (scores * (call.heads * call.dim) ** -0.5).softmax(0)
        values = torch.stack([part(token, head, 2) for token in tokens])
        out[n, y, x, head * call.dim : (head + 1) * call.dim] = weights @ values
    return out
