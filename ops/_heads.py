"""Heads of packed maps in PyTorch, for attention whose cost is linear in the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import accumulation_dtype


def split_heads(packed: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """Tokens `(B, heads, N, D)` of the parts of a packed map, in the type of their sums."""
    tokens = packed.flatten(1, 2).unflatten(-1, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return tokens.to(accumulation_dtype(packed.dtype)).unbind(0)


def pack_heads(parts: list[Tensor], like: Tensor) -> Tensor:
    """The map of the parts `(B, heads, N, D)`, one after the other, in the type of `like`."""
    packed = torch.stack([part.transpose(1, 2) for part in parts], dim=2)
    return packed.flatten(2).unflatten(1, like.shape[1:3]).to(like.dtype)
