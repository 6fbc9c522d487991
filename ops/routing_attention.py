"""Attention of every region of a map to the regions it chose: bi-level routing (BiFormer).

A map is divided into `R = rows * cols` regions of `t = h * w` tokens. With Q and K the mean query
and key of the regions `(R, C)`, region r attends to the K regions of the largest `Q[r] K^T`, one
choice for all heads. With q `(t, D)` of region r and a head, k and v `(K * t, D)` of all tokens of
the regions that r chose:

    S = scale * q k^T           (t, K * t)
    A = softmax(S)              y = A v

and backward, with `g` the gradient of `y`; choices carry none:

    dA = g v^T                  dS = A * (dA - rowsum(A * dA))
    dq = scale * dS k           dk = scale * dS^T q         dv = A^T g

where dk and dv of a region sum over all that chose it. The official code copies the keys and values
that a region chose, and its backward pass makes room, for every region, for those of all R. Here
kernels read and sum them where they lie, and a CPU copies those of a few regions at a time, or
masks the scores of all tokens where regions are tiny.

A map that the regions do not fill goes on below and to the right, with tokens that are never
queries but count as keys and values like all others: those of the vector `pad`, or zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _routing_pytorch as pytorch
from ._common import accumulation_dtype, autocast, kernels, reference_in_use
from ._regions import Regions, flat_index, inside, merge, pad_tokens, partition, validate


def routing_attention_reference(
    qkv: Tensor,
    regions: Tensor,
    num_heads: int,
    num_regions: tuple[int, int],
    region_size: tuple[int, int],
    pad: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute `routing_attention` in plain, differentiable PyTorch.

    Keys and values are copied for the regions that chose them, K maps of each: by `index_select`,
    since `gather` on an expanded view has a backward pass of R maps of each.
    """
    at, chosen = Regions(*num_regions, *region_size), flat_index(regions)
    tokens = pad_tokens(partition(qkv, at), inside(qkv, at), pad)
    q, k, v = tokens.flatten(0, 1).chunk(3, dim=-1)
    k, v = (pytorch.take(part, chosen) for part in (k, v))
    q, k, v = (pytorch.split_heads(part, num_heads) for part in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) * _score_scale(qkv, scale)
    out = pytorch.join_heads(scores.softmax(dim=-1).to(v.dtype) @ v)
    return merge(out.unflatten(0, tokens.shape[:2]), at, *qkv.shape[1:3])


def _score_scale(qkv: Tensor, scale: float | None) -> float:
    """The factor of the scores: `scale`, or that of the whole width."""
    if scale is not None:
        return scale
    channels = qkv.shape[-1] // 3
    # a trace would take the power in float32
    return (int(channels) if torch.jit.is_tracing() else channels) ** -0.5


@torch.library.custom_op(
    "backbones::routing_attention",
    mutates_args=(),
    schema="(Tensor qkv, Tensor regions, Tensor? pad, SymInt num_heads, SymInt rows, "
    "SymInt cols, SymInt height, SymInt width, float scale) -> (Tensor, Tensor)",
)
def _forward(
    qkv: Tensor, regions: Tensor, pad: Tensor | None, num_heads: int, *args: Any
) -> tuple[Tensor, Tensor]:
    # the matrix units that Triton reaches have no float64 on most devices
    if qkv.dtype == torch.float64:
        return pytorch.forward(qkv, regions, pad, num_heads, *args)
    *layout, scale = args
    launch = kernels("routing_attention", qkv)
    return launch.forward(qkv, regions, pad, num_heads, Regions(*layout), scale)


# one by one: of several devices at once PyTorch's set_kernel_enabled knows the last only
_forward.register_kernel("cpu")(pytorch.forward)
_forward.register_kernel("mps")(pytorch.forward)


@_forward.register_fake
def _(
    qkv: Tensor, regions: Tensor, pad: Tensor | None, num_heads: int, *args: Any
) -> tuple[Tensor, Tensor]:
    *size, packed = qkv.shape
    dtype = accumulation_dtype(qkv.dtype)
    return qkv.new_empty((*size, packed // 3)), qkv.new_empty((*size, num_heads), dtype=dtype)


@torch.library.custom_op(
    "backbones::routing_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor regions, Tensor? pad, Tensor out, Tensor lse, "
    "SymInt num_heads, SymInt rows, SymInt cols, SymInt height, SymInt width, float scale) "
    "-> (Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    qkv: Tensor,
    regions: Tensor,
    pad: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    *args: Any,
) -> tuple[Tensor, Tensor]:
    if qkv.dtype == torch.float64:
        return pytorch.backward(grad, qkv, regions, pad, out, lse, num_heads, *args)
    *layout, scale = args
    launch = kernels("routing_attention", qkv)
    at = Regions(*layout)
    return launch.backward(grad, qkv, regions, pad, out, lse, num_heads, at, scale)


_backward.register_kernel("cpu")(pytorch.backward)
_backward.register_kernel("mps")(pytorch.backward)


@_backward.register_fake
def _(
    grad: Tensor,
    qkv: Tensor,
    regions: Tensor,
    pad: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    *args: Any,
) -> tuple[Tensor, Tensor]:
    grad_pad = qkv.new_empty(0) if pad is None else pad.new_empty(pad.shape)
    return qkv.new_empty(qkv.shape), grad_pad


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.num_heads, ctx.rows, ctx.cols, ctx.height, ctx.width, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    args = (ctx.num_heads, ctx.rows, ctx.cols, ctx.height, ctx.width, ctx.scale)
    # once: checkpointing recomputes them at every access
    qkv, regions, pad, *results = ctx.saved_tensors
    grad_qkv, grad_pad = _backward(grad.contiguous(), qkv, regions, pad, *results, *args)
    return grad_qkv, None, None if pad is None else grad_pad, *(None for _ in args)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _validate_regions(qkv: Tensor, regions: Tensor, num_regions: tuple[int, int]) -> None:
    expected, shape = (qkv.shape[0], num_regions[0] * num_regions[1]), tuple(regions.shape)
    if regions.ndim != 3 or shape[:2] != expected or not 1 <= shape[2] <= expected[1]:
        raise ValueError(
            f"regions {shape} must be {(*expected, 'topk')} with topk in 1..{expected[1]}"
        )
    if regions.dtype != torch.int64:
        raise ValueError(f"regions of {regions.dtype} must be int64, as route_regions returns")


def routing_attention(
    qkv: Tensor,
    regions: Tensor,
    num_heads: int,
    num_regions: tuple[int, int],
    region_size: tuple[int, int],
    pad: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend from every region of a map to all tokens of the regions that it chose.

    Args:
        qkv: Packed queries, keys and values `(B, H, W, 3C)`, each head by head.
        regions: Chosen regions `(B, R, K)`, int64 in 0..R - 1, none twice in a row; see
            `route_regions`.
        num_heads: Heads, of `D = C / num_heads` channels.
        num_regions: Rows and columns of regions, `R = rows * columns`.
        region_size: Rows and columns of tokens in a region; the regions must cover the map.
        pad: Vector `(3C,)` that tokens outside the map have as q, k, v; zeros without it. They are
            keys and values like all others, and never queries.
        scale: Factor of the scores before the softmax. Default: `C ** -0.5`, not `D ** -0.5`.

    Returns:
        The map `(B, H, W, C)`, contiguous, channels head by head.

    Layout:
        All strides are free; the kernels copy only if those of the channels are not one.

    Numerics:
        float32, bfloat16 or float16, accumulated in float32, by Triton kernels on a GPU; float64,
        and all types on a CPU, by PyTorch. Under autocast `qkv` and `pad` are cast to its type
        first. float32 products follow `torch.set_float32_matmul_precision`. Inputs, the output and
        the logsumexp of the scores are kept for the backward pass.

    Gradients:
        For `qkv` and `pad`, deterministic, once differentiable.

    Raises:
        ValueError: Shapes that do not fit together, or `regions` of another type.

    Source:
        BiFormer, arXiv 2303.08810, section 3.2.
    """
    if torch.jit.is_scripting():
        factor = (qkv.shape[-1] // 3) ** -0.5 if scale is None else scale
        rows, cols = num_regions
        height, width = region_size
        return torch.ops.backbones.routing_attention(
            qkv, regions, pad, num_heads, rows, cols, height, width, factor
        )[0]
    else:
        return _dispatch(qkv, regions, num_heads, num_regions, region_size, pad, scale)


def _dispatch(
    qkv: Tensor,
    regions: Tensor,
    num_heads: int,
    num_regions: tuple[int, int],
    region_size: tuple[int, int],
    pad: Tensor | None,
    scale: float | None,
) -> Tensor:
    if not isinstance(qkv, torch.fx.Proxy):
        # a trace sees sizes as tensors
        if not torch.jit.is_tracing():
            validate(qkv, num_heads, num_regions, region_size, pad)
            _validate_regions(qkv, regions, num_regions)
        qkv, pad = autocast(qkv, pad)
        if reference_in_use():
            return routing_attention_reference(
                qkv, regions, num_heads, num_regions, region_size, pad, scale
            )
    # through the packet, which torch.fx records; a call of the Python object it would not
    return torch.ops.backbones.routing_attention(
        qkv, regions, pad, num_heads, *num_regions, *region_size, _score_scale(qkv, scale)
    )[0]
