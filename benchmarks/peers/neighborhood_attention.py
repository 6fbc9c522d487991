"""What `neighborhood_attention` is compared with.

All peers start from queries, keys and values, as the op does, and compute the same: zeros around
the map are keys of score 0. The official extension (torch 1.5, CUDA 10.1) builds with no current
PyTorch. NATTEN is no peer: it has the clamped windows only, and its kernels come as wheels from its
authors, for a few builds of PyTorch; its package on PyPI runs FlexAttention without them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops._neighborhood import window_positions
from benchmarks.cases import Tensors
from benchmarks.cases.neighborhood_attention import NeighborhoodCase

from ._peer import Compile, CompiledReference, Outputs, Peer, Peers
from .dynamic_mixing import unfold_windows


class Unfolded(Peer):
    """The official formulation: windows of keys, then of values, copied on planes.

    Heads are folded into the batch; a shift rolls the planes and the result, head by head. The
    official layer computes in float32, this peer in the type of its inputs, and the softmax in
    float32.
    """

    def __init__(self, case: NeighborhoodCase, compile: Compile) -> None:
        super().__init__(case, compile)
        self.case, self.function = case, self._function

    def prepare(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """Make planes `(B * heads, D, H, W)` of q, k and v."""
        parts = tensors["qkv"].unflatten(-1, (3, self.case.heads, -1)).permute(3, 0, 4, 5, 1, 2)
        return tuple(part.flatten(0, 1).contiguous() for part in parts)

    def to_map(self, result: Tensor) -> Tensor:
        """Put heads behind one another, and channels last."""
        return result.unflatten(0, (-1, self.case.heads)).flatten(1, 2).permute(0, 2, 3, 1)

    def run(self, *arguments: Tensor) -> Outputs:
        """Attend."""
        return (self.function(*arguments),)

    def _function(self, *parts: Tensor) -> Tensor:
        q, k, v = (self._roll(part, -1) for part in parts)
        scores = (q.flatten(2).unsqueeze(2) * self._windows(k)).sum(1) * q.shape[1] ** -0.5
        weights = scores.softmax(1, dtype=torch.float32).to(v.dtype)
        out = (weights.unsqueeze(1) * self._windows(v)).sum(2)
        return self._roll(out.unflatten(-1, q.shape[2:]), 1)

    def _roll(self, planes: Tensor, sign: int) -> Tensor:
        if not self.case.shifts:
            return planes
        heads = planes.unflatten(0, (-1, self.case.heads)).unbind(1)
        count = len(self.case.shifts)
        rolled = [
            head.roll([sign * n for n in self.case.shifts[i % count]], (2, 3))
            for i, head in enumerate(heads)
        ]
        return torch.stack(rolled, 1).flatten(0, 1)

    def _windows(self, planes: Tensor) -> Tensor:
        """Copy the window of every pixel: `(B * heads, D, slots, H * W)`."""
        size = self.case.size
        if self.case.clamp:
            return unfold_windows(planes, size).flatten(2, 3).transpose(2, 3)
        columns = F.unfold(planes, size, padding=size // 2)
        return columns.unflatten(1, (planes.shape[1], -1))


class CompiledUnfolded(Unfolded):
    """The same under `torch.compile`."""

    def __init__(self, case: NeighborhoodCase, compile: Compile) -> None:
        super().__init__(case, compile)
        self.function = compile(self._function)


class Flex(Peer):
    """FlexAttention under `torch.compile`, tokens row by row, with a mask of the neighbors.

    It knows no keys that are nowhere. With n of them beside scores whose logsumexp is lse, the
    result is what it returns times `sigmoid(lse - log n)`.
    """

    trains_on_cpu = False

    def __init__(self, case: NeighborhoodCase, compile: Compile) -> None:
        from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

        super().__init__(case, compile)
        self.case = case
        device = "cuda" if torch.cuda.is_available() else "cpu"
        axes = zip((case.height, case.width), self._shifts().T.tolist(), strict=True)
        rows, cols = (_seen(length, offsets, case).to(device) for length, offsets in axes)
        sizes = rows.sum(-1)[:, :, None] * cols.sum(-1)[:, None]
        outside = torch.zeros_like(sizes) if case.clamp else case.size**2 - sizes
        count, width, tokens = len(rows), case.width, case.height * case.width
        self.outside = outside.flatten(1)[torch.arange(case.heads, device=device) % count].log()

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            turn = h % count
            return rows[turn, i // width, j // width] & cols[turn, i % width, j % width]

        # only compiled it holds no mask of all pairs of tokens
        block_mask = create_block_mask(
            seen, None, case.heads, tokens, tokens, device=device, _compile=device == "cuda"
        )

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, aux = flex_attention(
                q, k, v, block_mask=block_mask, return_aux=AuxRequest(lse=True)
            )
            assert aux.lse is not None
            kept = torch.sigmoid(aux.lse - self.outside)
            return out * kept.unsqueeze(-1).to(out.dtype)

        self.attention: Callable[..., Tensor] = compile(attend)

    def _shifts(self) -> Tensor:
        return torch.tensor(self.case.shifts or [(0, 0)])

    def prepare(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """Make q, k and v `(B, heads, N, D)`."""
        tokens = tensors["qkv"].flatten(1, 2).unflatten(-1, (3, self.case.heads, -1))
        return tuple(part.contiguous() for part in tokens.permute(2, 0, 3, 1, 4))

    def run(self, *arguments: Tensor) -> Outputs:
        """Attend."""
        return (self.attention(*arguments),)

    def to_map(self, result: Tensor) -> Tensor:
        """Join the heads."""
        size = (self.case.height, self.case.width)
        return result.transpose(1, 2).flatten(2).unflatten(1, size)


def _seen(length: int, offsets: list[int], case: NeighborhoodCase) -> Tensor:
    """Which positions of an axis see which, for every shift: `(shifts, length, length)`."""
    position = torch.arange(length)
    if case.clamp:
        slots = window_positions(length, case.size)
    else:
        slots = position[:, None] + torch.arange(case.size) - case.size // 2
    seen = (slots[:, :, None] == position).any(1)
    return torch.stack([seen.roll((n, n), (0, 1)) for n in offsets])


PEERS: Peers = {
    "backbones": Peer,
    "unfold": Unfolded,
    "unfold compiled": CompiledUnfolded,
    "reference compiled": CompiledReference,
    "flex core compiled": Flex,
}
