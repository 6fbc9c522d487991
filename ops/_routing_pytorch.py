"""Attention to chosen regions of a map, and its gradients, in plain PyTorch.

Written for a CPU: what is copied, and how much at once, keeps it in cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import accumulation_dtype
from ._regions import Regions, flat_index, inside, merge, pad_tokens, partition

# scores, keys and values held at once, per block of regions: 1 MB in float32, to stay in cache
_BLOCK = 1 << 18


def take(tokens: Tensor, chosen: Tensor) -> Tensor:
    """Regions `(n, K)` of `(B * R, t, C)`, one after the other: `(n, K * t, C)`."""
    return tokens.index_select(0, chosen.flatten()).unflatten(0, chosen.shape).flatten(1, 2)


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """Split `(n, N, C)` into `(n, heads, N, D)`."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(tokens: Tensor) -> Tensor:
    """Undo `split_heads`."""
    return tokens.transpose(1, 2).flatten(2)


def forward(
    qkv: Tensor, regions: Tensor, pad: Tensor | None, num_heads: int, *args: Any
) -> tuple[Tensor, Tensor]:
    """Compute the map `(B, H, W, C)` image by image, so that an image stays in cache.

    `backward` computes the softmax again: in place of its logsumexps there are zeros.
    """
    *layout, scale = args
    at, (*size, packed) = Regions(*layout), qkv.shape
    attend = _attend_masked if _masked(at, regions.shape[2]) else _attend_gathered
    out = qkv.new_empty((*size, packed // 3))
    with torch.autocast(qkv.device.type, enabled=False):
        for image, chosen, result in zip(qkv, regions, out, strict=True):
            tokens = _fill(image, pad, at).to(accumulation_dtype(qkv.dtype))
            y = attend(tokens, chosen, num_heads, at, scale)
            result.copy_(y[: size[1], : size[2]])
    return out, qkv.new_zeros((*size, num_heads), dtype=accumulation_dtype(qkv.dtype))


def _masked(at: Regions, topk: int) -> bool:
    """Whether to attend to all tokens of a map and mask some, rather than to copy those chosen.

    With few tokens in a region, copies cost more than the scores that are thrown away.
    """
    return at.tokens <= 8 and at.regions <= 4 * topk


def _fill(image: Tensor, pad: Tensor | None, at: Regions) -> Tensor:
    """Continue an image `(H, W, 3C)` by `pad`, or zeros, until the regions are full."""
    height, width, packed = image.shape
    if at.filled(height, width):
        return image
    full = image.new_zeros((at.rows * at.height, at.cols * at.width, packed))
    if pad is not None:
        full.copy_(pad)
    full[:height, :width] = image
    return full


def _attend_masked(
    image: Tensor, chosen: Tensor, num_heads: int, at: Regions, scale: float
) -> Tensor:
    """Attend from `(H, W, 3C)` to all tokens, but for a mask of the chosen regions `(R, K)`."""
    height, width, _ = image.shape
    q, k, v = image.reshape(1, height * width, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    rows = torch.arange(height, device=image.device) // at.height
    columns = torch.arange(width, device=image.device) // at.width
    region = (rows[:, None] * at.cols + columns).flatten()
    mask = image.new_full((at.regions, at.regions), -torch.inf).scatter_(1, chosen, 0)
    mask = mask.index_select(0, region).index_select(1, region)
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return out.transpose(1, 2).reshape(height, width, -1)


def _attend_gathered(
    image: Tensor, chosen: Tensor, num_heads: int, at: Regions, scale: float
) -> Tensor:
    """Attend from `(H, W, 3C)` to copies of the chosen regions `(R, K)`, a few at a time."""
    # (3, heads * R, t * D): what one head has of one region is one row, and cheap to copy
    image = image.unflatten(-1, (3, num_heads, -1)).unflatten(1, (at.cols, at.width))
    tokens = image.unflatten(0, (at.rows, at.height)).permute(4, 5, 0, 2, 1, 3, 6)
    q, k, v = tokens.reshape(3, num_heads * at.regions, -1)
    first = torch.arange(num_heads, device=image.device) * at.regions
    index = (first[:, None, None] + chosen).flatten(0, 1)
    out = torch.empty_like(q)
    step = max(1, _BLOCK // (2 * chosen.shape[1] * q.shape[1]))
    for some, into, rows in zip(q.split(step), out.split(step), index.split(step), strict=True):
        # regions as heads: (1, block, t, D), and (1, block, K * t, D) of keys and values
        block = (1, len(some), -1, image.shape[-1])
        keys, values = (part.index_select(0, rows.flatten()).view(block) for part in (k, v))
        y = F.scaled_dot_product_attention(some.view(block), keys, values, scale=scale)
        into.copy_(y.view_as(into))
    out = out.view(num_heads, at.rows, at.cols, at.height, at.width, -1)
    return out.permute(1, 3, 2, 4, 0, 5).reshape(at.rows * at.height, at.cols * at.width, -1)


class _Tokens:
    """The regions of one call as tensors `(B * R, t, C)`, and what they chose `(B * R, K)`."""

    def __init__(
        self,
        qkv: Tensor,
        regions: Tensor,
        pad: Tensor | None,
        num_heads: int,
        at: Regions,
        scale: float,
    ) -> None:
        self.num_heads, self.at, self.scale = num_heads, at, scale
        self.chosen, dtype = flat_index(regions), accumulation_dtype(qkv.dtype)
        channels = qkv.shape[-1] // 3
        self.q = partition(qkv[..., :channels], at).flatten(0, 1).to(dtype)
        # keys beside their values: both are taken at once
        pairs = partition(qkv[..., channels:], at).to(dtype)
        vector = None if pad is None else pad[channels:]
        self.pairs = pad_tokens(pairs, inside(qkv, at), vector).flatten(0, 1)

    def blocks(self) -> Iterator[slice]:
        """Slices over the regions that bound the scores, keys and values held at once."""
        keys = self.at.tokens * self.chosen.shape[1]
        step = max(1, _BLOCK // (keys * (self.num_heads * self.at.tokens + self.pairs.shape[-1])))
        for start in range(0, len(self.q), step):
            yield slice(start, start + step)

    def load(self, block: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(block, heads, t, D)`, their keys and values `(block, heads, K * t, D)`."""
        parts = (self.q[block], *take(self.pairs, self.chosen[block]).chunk(2, dim=-1))
        q, k, v = (split_heads(part, self.num_heads) for part in parts)
        return q, k, v

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Scores `(block, heads, t, K * t)`."""
        return (q @ k.mT).mul_(self.scale)

    def add_pairs(self, total: Tensor, block: slice, parts: tuple[Tensor, Tensor]) -> None:
        """Add what a block gives to keys and values to that of their regions `(B * R, t, 2C)`."""
        index = self.chosen[block].flatten()
        pairs = torch.cat([join_heads(part) for part in parts], dim=-1)
        pairs = pairs.reshape(len(index), self.at.tokens, -1)
        # each of the two adds in a fixed order on one kind of device only
        if total.is_cuda:
            total.index_put_((index,), pairs, accumulate=True)
        else:
            total.index_add_(0, index, pairs)


def _merge(tokens: Tensor, at: Regions, like: Tensor) -> Tensor:
    """The map of regions `(B * R, t, channels)`, of the size of another one."""
    batch, height, width, _ = like.shape
    return merge(tokens.unflatten(0, (batch, at.regions)), at, height, width)


def backward(
    grad: Tensor,
    qkv: Tensor,
    regions: Tensor,
    pad: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    *args: Any,
) -> tuple[Tensor, Tensor]:
    *layout, scale = args
    at = Regions(*layout)
    with torch.autocast(qkv.device.type, enabled=False):
        dq, pairs = _token_gradients(grad, _Tokens(qkv, regions, pad, num_heads, at, scale))
        grad_qkv, channels = qkv.new_empty(qkv.shape), grad.shape[-1]
        grad_qkv[..., :channels] = _merge(dq, at, qkv)
        grad_qkv[..., channels:] = _merge(pairs, at, qkv)
        if pad is None:
            return grad_qkv, qkv.new_empty(0)
        grad_pad = torch.zeros_like(pad)
        grad_pad[channels:] = _sum_outside(pairs, inside(qkv, at))
        return grad_qkv, grad_pad


def _token_gradients(grad: Tensor, tokens: _Tokens) -> tuple[Tensor, Tensor]:
    """Gradients of queries `(B * R, t, C)`, and of keys beside values, outside the map too."""
    grad = partition(grad, tokens.at).flatten(0, 1)
    dq, pairs = torch.empty_like(tokens.q), torch.zeros_like(tokens.pairs)
    for block in tokens.blocks():
        q, k, v = tokens.load(block)
        g = split_heads(grad[block].to(q.dtype), tokens.num_heads)
        attention = tokens.scores(q, k).softmax(dim=-1)
        ds = g @ v.mT
        ds -= (attention * ds).sum(dim=-1, keepdim=True)
        ds *= attention
        ds *= tokens.scale
        dq[block] = join_heads(ds @ k)
        tokens.add_pairs(pairs, block, (ds.mT @ q, attention.mT @ g))
    return dq, pairs


def _sum_outside(tokens: Tensor, real: Tensor | None) -> Tensor:
    """Sum what tokens `(B * R, t, 2C)` outside the map have."""
    if real is None:
        return tokens.new_zeros(tokens.shape[-1])
    images = tokens.unflatten(0, (len(tokens) // len(real), len(real)))
    return images[:, ~real].sum((0, 1))
