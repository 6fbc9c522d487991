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
kernels read and sum them where they lie, and a CPU copies those of a few regions at a time.

A map that the regions do not fill goes on below and to the right, with tokens that are never
queries but count as keys and values like all others: those of the vector `pad`, or zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._common import accumulation_dtype, autocast, kernels, reference_in_use
from ._regions import Regions, flat_index, inside, merge, pad_tokens, partition, validate

# scores, keys and values held at once, per block of regions: 1 MB in float32, to stay in cache
_BLOCK = 1 << 18


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
    k, v = (_take(part, chosen) for part in (k, v))
    q, k, v = (_split_heads(part, num_heads) for part in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) * _score_scale(qkv, scale)
    out = _join_heads(scores.softmax(dim=-1).to(v.dtype) @ v)
    return merge(out.unflatten(0, tokens.shape[:2]), at, *qkv.shape[1:3])


def _score_scale(qkv: Tensor, scale: float | None) -> float:
    """The factor of the scores: `scale`, or that of the whole width."""
    if scale is not None:
        return scale
    channels = qkv.shape[-1] // 3
    # a trace would take the power in float32
    return (int(channels) if torch.jit.is_tracing() else channels) ** -0.5


def _take(tokens: Tensor, chosen: Tensor) -> Tensor:
    """Regions `(n, K)` of `(B * R, t, C)`, one after the other: `(n, K * t, C)`."""
    return tokens.index_select(0, chosen.flatten()).unflatten(0, chosen.shape).flatten(1, 2)


def _split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """Split `(n, N, C)` into `(n, heads, N, D)`."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _join_heads(tokens: Tensor) -> Tensor:
    """Undo `_split_heads`."""
    return tokens.transpose(1, 2).flatten(2)


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
        parts = (self.q[block], *_take(self.pairs, self.chosen[block]).chunk(2, dim=-1))
        q, k, v = (_split_heads(part, self.num_heads) for part in parts)
        return q, k, v

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Scores `(block, heads, t, K * t)`."""
        return (q @ k.mT).mul_(self.scale)

    def add_pairs(self, total: Tensor, block: slice, parts: tuple[Tensor, Tensor]) -> None:
        """Add what a block gives to keys and values to that of their regions `(B * R, t, 2C)`."""
        index = self.chosen[block].flatten()
        pairs = torch.cat([_join_heads(part) for part in parts], dim=-1)
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


def _forward_pytorch(
    qkv: Tensor, regions: Tensor, pad: Tensor | None, num_heads: int, *args: Any
) -> tuple[Tensor, Tensor]:
    *layout, scale = args
    with torch.autocast(qkv.device.type, enabled=False):
        tokens = _Tokens(qkv, regions, pad, num_heads, Regions(*layout), scale)
        out = torch.empty(tokens.q.shape, dtype=tokens.q.dtype, device=qkv.device)
        lse = out.new_empty((*out.shape[:2], num_heads))
        for block in tokens.blocks():
            q, k, v = tokens.load(block)
            scores = tokens.scores(q, k)
            attention = scores.softmax(dim=-1)
            # the logsumexp without a second round of exponentials
            lse[block] = (scores.amax(dim=-1) - attention.amax(dim=-1).log()).mT
            out[block] = _join_heads(attention @ v)
        return _merge(out, tokens.at, qkv).to(qkv.dtype), _merge(lse, tokens.at, qkv)


def _backward_pytorch(
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
        g = _split_heads(grad[block].to(q.dtype), tokens.num_heads)
        attention = tokens.scores(q, k).softmax(dim=-1)
        ds = g @ v.mT
        ds -= (attention * ds).sum(dim=-1, keepdim=True)
        ds *= attention
        ds *= tokens.scale
        dq[block] = _join_heads(ds @ k)
        tokens.add_pairs(pairs, block, (ds.mT @ q, attention.mT @ g))
    return dq, pairs


def _sum_outside(tokens: Tensor, real: Tensor | None) -> Tensor:
    """Sum what tokens `(B * R, t, 2C)` outside the map have."""
    if real is None:
        return tokens.new_zeros(tokens.shape[-1])
    images = tokens.unflatten(0, (len(tokens) // len(real), len(real)))
    return images[:, ~real].sum((0, 1))


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
        return _forward_pytorch(qkv, regions, pad, num_heads, *args)
    *layout, scale = args
    launch = kernels("routing_attention", qkv)
    return launch.forward(qkv, regions, pad, num_heads, Regions(*layout), scale)


# one by one: of several devices at once PyTorch's set_kernel_enabled knows the last only
_forward.register_kernel("cpu")(_forward_pytorch)
_forward.register_kernel("mps")(_forward_pytorch)


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
        return _backward_pytorch(grad, qkv, regions, pad, out, lse, num_heads, *args)
    *layout, scale = args
    launch = kernels("routing_attention", qkv)
    at = Regions(*layout)
    return launch.backward(grad, qkv, regions, pad, out, lse, num_heads, at, scale)


_backward.register_kernel("cpu")(_backward_pytorch)
_backward.register_kernel("mps")(_backward_pytorch)


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
