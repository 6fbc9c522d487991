"""Calls of window attention that the tests share, and the op written out token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backbones.ops import window_attention
from tests.support import golden


@dataclass(frozen=True)
class Call:
    """One call on a map `(batch, height, width)`."""

    name: str
    map_size: tuple[int, int, int]
    window: tuple[int, int]
    heads: int = 2
    dim: int = 16
    grid: bool = False
    head_first: bool = False
    table: bool = True
    pad: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the op that are not tensors."""
        return {
            "num_heads": self.heads,
            "window_size": self.window,
            "grid": self.grid,
            "head_first": self.head_first,
        }

    def inputs(self) -> list[Tensor | None]:
        """Leaves qkv, table and pad, float64; None for what the call leaves out."""
        channels = 3 * self.heads * self.dim
        p, q = self.window
        table = (self.heads, 2 * p - 1, 2 * q - 1) if self.table else None
        shapes = {"qkv": (*self.map_size, channels), "table": table}
        shapes["pad"] = (channels,) if self.pad else None
        return [
            None if shape is None else torch.from_numpy(golden.normal(name, shape)).requires_grad_()
            for name, shape in shapes.items()
        ]

    def weight(self) -> Tensor:
        """What the output is multiplied by, to take gradients."""
        return torch.from_numpy(golden.normal("weight", (*self.map_size, self.heads * self.dim)))

    def __call__(self, qkv: Tensor, table: Tensor | None, pad: Tensor | None) -> Tensor:
        """Call the op."""
        return window_attention(qkv, table, pad=pad, **self.options)


# maps that the windows fill and do not fill, windows larger than the map, all options
CALLS = [
    Call("block", (2, 4, 6), (2, 3)),
    Call("grid", (2, 4, 6), (2, 3), grid=True, head_first=True),
    Call("hidden", (1, 5, 7), (3, 2), head_first=True),
    Call("hidden grid", (2, 5, 7), (3, 2), grid=True),
    Call("padded", (1, 5, 7), (3, 4), table=False, pad=True),
    Call("padded grid", (1, 5, 7), (3, 4), grid=True, pad=True),
    Call("map in a window", (2, 2, 3), (4, 4), pad=True, head_first=True),
    Call("sparse map in a grid", (1, 2, 3), (4, 4), grid=True),
    Call("one token", (1, 2, 3), (1, 1)),
]


def by_hand(call: Call, qkv: Tensor, table: Tensor | None, pad: Tensor | None) -> Tensor:
    """The op token by token, from its definition, in float64."""
    (batch, height, width), (p, q) = call.map_size, call.window
    rows, cols = -(-height // p), -(-width // q)
    out = torch.zeros(batch, height, width, call.heads * call.dim, dtype=qkv.dtype)

    def part(token: Tensor, head: int, index: int) -> Tensor:
        if call.head_first:
            return token.view(call.heads, 3, call.dim)[head, index]
        return token.view(3, call.heads, call.dim)[index, head]

    def position(a: int, b: int, i: int, j: int) -> tuple[int, int]:
        return (i * rows + a, j * cols + b) if call.grid else (a * p + i, b * q + j)

    places = [(i, j) for i in range(p) for j in range(q)]
    for n, a, b, head in (
        (n, a, b, h)
        for n in range(batch)
        for a in range(rows)
        for b in range(cols)
        for h in range(call.heads)
    ):
        tokens = {}
        for place in places:
            y, x = position(a, b, *place)
            if y < height and x < width:
                tokens[place] = qkv[n, y, x]
            elif pad is not None:
                tokens[place] = pad
        for i, j in places:
            y, x = position(a, b, i, j)
            if y >= height or x >= width:
                continue
            query = part(qkv[n, y, x], head, 0)
            scores = []
            for (ki, kj), token in tokens.items():
                bias = 0.0 if table is None else table[head, i - ki + p - 1, j - kj + q - 1]
                scores.append(query @ part(token, head, 1) * call.dim**-0.5 + bias)
            weights = torch.stack(scores).softmax(0)
            values = torch.stack([part(token, head, 2) for token in tokens.values()])
            out[n, y, x, head * call.dim : (head + 1) * call.dim] = weights @ values
    return out
