"""The choice of bi-level routing: which regions of a map every region attends to (BiFormer).

A map is divided into `R = rows * cols` regions. With Q and K the mean query and key of the regions
`(R, C)` over all heads, region r chooses those of the largest `Q[r] K^T`, see `routing_attention`
(BiFormer, arXiv 2303.08810, section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import accumulation_dtype, kernels, reference_in_use
from ._regions import Regions, inside, pad_tokens, partition, validate


def _means(qkv: Tensor, pad: Tensor | None, at: Regions) -> Tensor:
    """Mean query and key `(B, R, 2C)` of the regions of a packed map, not rounded.

    Tokens outside the map count as `pad`; without it they do not count.
    """
    tokens, real = partition(qkv[..., : qkv.shape[-1] // 3 * 2], at), inside(qkv, at)
    dtype = accumulation_dtype(qkv.dtype)
    if pad is None and real is not None:
        counts = real.sum(-1).clamp(min=1).to(dtype)
        return tokens.sum(2, dtype=dtype) / counts[:, None]
    vector = None if pad is None else pad[: tokens.shape[-1]]
    return pad_tokens(tokens.to(dtype), real, vector).sum(2) / at.tokens


def _best(means: Tensor, topk: int) -> Tensor:
    """The regions `(B, R, K)` whose mean keys fit the mean queries best, best first."""
    queries, keys = means.chunk(2, dim=-1)
    return (queries @ keys.transpose(1, 2)).topk(topk, dim=-1).indices


def route_regions_reference(
    qkv: Tensor,
    topk: int,
    num_regions: tuple[int, int],
    region_size: tuple[int, int],
    pad: Tensor | None = None,
) -> Tensor:
    """Compute `route_regions` in plain PyTorch."""
    with torch.no_grad():
        return _best(_means(qkv, pad, Regions(*num_regions, *region_size)), topk)


@torch.library.custom_op(
    "backbones::route_regions",
    mutates_args=(),
    schema="(Tensor qkv, Tensor? pad, SymInt topk, SymInt rows, SymInt cols, SymInt height, "
    "SymInt width) -> Tensor",
)
def _route(qkv: Tensor, pad: Tensor | None, topk: int, *args: Any) -> Tensor:
    if qkv.dtype == torch.float64:
        return _route_pytorch(qkv, pad, topk, *args)
    with torch.autocast(qkv.device.type, enabled=False):
        means = kernels("route_regions", qkv).region_means(qkv, pad, Regions(*args))
        return _best(means, topk)


def _route_pytorch(qkv: Tensor, pad: Tensor | None, topk: int, *args: Any) -> Tensor:
    with torch.autocast(qkv.device.type, enabled=False):
        return _best(_means(qkv, pad, Regions(*args)), topk)


# one by one: of several devices at once PyTorch's set_kernel_enabled knows the last only
_route.register_kernel("cpu")(_route_pytorch)
_route.register_kernel("mps")(_route_pytorch)


@_route.register_fake
def _(qkv: Tensor, pad: Tensor | None, topk: int, *args: Any) -> Tensor:
    return qkv.new_empty((qkv.shape[0], Regions(*args).regions, topk), dtype=torch.int64)


def route_regions(
    qkv: Tensor,
    topk: int,
    num_regions: tuple[int, int],
    region_size: tuple[int, int],
    pad: Tensor | None = None,
) -> Tensor:
    """Choose the regions that every region of a map attends to, by their means.

    Args:
        qkv: Packed queries, keys and values `(B, H, W, 3C)`; values do not matter.
        topk: Regions to choose, `K`.
        num_regions: Rows and columns of regions; region `row * columns + column` is one of
            `R = rows * columns`.
        region_size: Rows and columns of tokens in a region; the regions must cover the map.
        pad: Vector `(3C,)` that tokens outside the map have as q, k, v, and with which they count
            in the means; without it they do not count, and a region without tokens has means of
            zero.

    Returns:
        Numbers of regions `(B, R, K)`, int64, best first, no region twice.

    Layout:
        All strides are free; the kernel copies only if those of the channels are not one.

    Numerics:
        Means and their products in float32, in float64 for float64; by a Triton kernel and PyTorch
        on a GPU, by PyTorch on a CPU. Products follow `torch.set_float32_matmul_precision`.

    Gradients:
        None: BiFormer detaches its choice.

    Raises:
        ValueError: Shapes that do not fit together, or a `topk` beyond the regions.

    Source:
        BiFormer, arXiv 2303.08810, section 3.2.
    """
    if torch.jit.is_scripting():
        rows, cols = num_regions
        height, width = region_size
        return torch.ops.backbones.route_regions(qkv, pad, topk, rows, cols, height, width)
    else:
        return _dispatch(qkv, topk, num_regions, region_size, pad)


def _dispatch(
    qkv: Tensor,
    topk: int,
    num_regions: tuple[int, int],
    region_size: tuple[int, int],
    pad: Tensor | None,
) -> Tensor:
    if not isinstance(qkv, torch.fx.Proxy):
        # a trace sees sizes as tensors
        if not torch.jit.is_tracing():
            validate(qkv, 1, num_regions, region_size, pad)
            if not 1 <= topk <= num_regions[0] * num_regions[1]:
                raise ValueError(f"topk={topk} must be in 1..R of num_regions={num_regions}")
        if reference_in_use():
            return route_regions_reference(qkv, topk, num_regions, region_size, pad)
    return torch.ops.backbones.route_regions(qkv, pad, topk, *num_regions, *region_size)
