"""Attention between the channels of a map (DaViT).

DaViT (arXiv 2204.03645, section 3.2) lets channels attend to channels, in heads of `D`: scores are
sums over all `N = H * W` tokens, so the cost is linear in `N`. With `a`, `b`, `m` of one head
`(N, D)`:

    S = scale * a^T b           (D, D)
    A = softmax(S)              rows sum to one
    y = m A^T                   (N, D), y[n, i] = sum of A[i, j] m[n, j] over j

In the released classifiers `a`, `b`, `m` are the keys, values and queries, with
`scale = D^-1/2`; in Florence-2 (arXiv 2311.06242) they are the queries, keys and values, with
`scale = N^-1/2`. Backward, with `g` the gradient of `y`:

    dA = g^T m          dS = A * (dA - rowsum(A * dA))
    dm = g A            da = scale * b dS^T     db = scale * a dS
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._common import (
    accumulation_dtype,
    autocast,
    kernels,
    outside_autocast,
    reference_in_use,
    runs_at_once,
)
from ._heads import pack_heads, split_heads


class Roles(NamedTuple):
    """What a, b and m of a head are: 0 for its queries, 1 for its keys, 2 for its values."""

    rows: int
    cols: int
    mixed: int


def roles(mix_values: bool) -> Roles:
    """The roles of the two variants."""
    return Roles(0, 1, 2) if mix_values else Roles(1, 2, 0)


def score_scale(qkv: Tensor, num_heads: int, mix_values: bool, scale: float | None) -> float:
    """The factor of the scores: `scale`, or the variant's own."""
    if scale is not None:
        return scale
    count = qkv.shape[1] * qkv.shape[2] if mix_values else qkv.shape[3] // (3 * num_heads)
    return max(1, count) ** -0.5


def _split(qkv: Tensor, num_heads: int, mix_values: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens a, b and m `(B, heads, N, D)` of a packed map, in the type of their sums."""
    parts = split_heads(qkv, 3, num_heads)
    rows, cols, mixed = roles(mix_values)
    return parts[rows], parts[cols], parts[mixed]


def channel_attention_reference(
    qkv: Tensor, num_heads: int, mix_values: bool = False, scale: float | None = None
) -> Tensor:
    """Compute `channel_attention` in plain, differentiable PyTorch."""
    a, b, m = _split(qkv, num_heads, mix_values)
    factor = score_scale(qkv, num_heads, mix_values, scale)
    weights = (a.transpose(-1, -2) @ b * factor).softmax(dim=-1)
    return pack_heads([m @ weights.transpose(-1, -2)], qkv)


def _forward_pytorch(
    qkv: Tensor, num_heads: int, mix_values: bool, scale: float | None, keep: bool
) -> tuple[Tensor, Tensor]:
    with outside_autocast(qkv):
        a, b, m = _split(qkv, num_heads, mix_values)
        weights = a.new_empty((*a.shape[:2], a.shape[3], a.shape[3]))
        out = a.new_empty((len(a), a.shape[2], *a.shape[1::2]))
        # image by image: heads of all images are no batch of one stride, and would be copied
        for one_a, one_b, one_weights in zip(a, b, weights, strict=True):
            torch.bmm(one_a.mT, one_b, out=one_weights)
        weights = weights.mul_(score_scale(qkv, num_heads, mix_values, scale)).softmax(dim=-1)
        for one_m, one_weights, one_out in zip(m, weights, out, strict=True):
            torch.bmm(one_m, one_weights.mT, out=one_out.transpose(0, 1))
        y = out.flatten(2).unflatten(1, qkv.shape[1:3]).to(qkv.dtype)
        return y, weights if keep else weights.new_empty(0)


def _backward_pytorch(
    grad: Tensor,
    qkv: Tensor,
    weights: Tensor,
    num_heads: int,
    mix_values: bool,
    scale: float | None,
) -> Tensor:
    with outside_autocast(qkv):
        a, b, m = _split(qkv, num_heads, mix_values)
        (g,) = split_heads(grad, 1, num_heads)
        da = g.mT @ m
        ds = weights * (da - (weights * da).sum(dim=-1, keepdim=True))
        ds *= score_scale(qkv, num_heads, mix_values, scale)
        parts = [b @ ds.mT, a @ ds, g @ weights]
        order = sorted(range(3), key=roles(mix_values).__getitem__)
        return pack_heads([parts[i] for i in order], qkv)


@torch.library.custom_op(
    "backbones::channel_attention",
    mutates_args=(),
    schema="(Tensor qkv, SymInt num_heads, bool mix_values, float? scale, bool keep) "
    "-> (Tensor, Tensor)",
)
def _forward(
    qkv: Tensor, num_heads: int, mix_values: bool, scale: float | None, keep: bool
) -> tuple[Tensor, Tensor]:
    # the matrix units that Triton reaches have no float64 on most devices
    if qkv.dtype == torch.float64:
        return _forward_pytorch(qkv, num_heads, mix_values, scale, keep)
    return kernels("channel_attention", qkv).forward(qkv, num_heads, mix_values, scale, keep)


# one by one: of several devices at once PyTorch's set_kernel_enabled knows the last only
_forward.register_kernel("cpu")(_forward_pytorch)
_forward.register_kernel("mps")(_forward_pytorch)


@_forward.register_fake
def _(
    qkv: Tensor, num_heads: int, mix_values: bool, scale: float | None, keep: bool
) -> tuple[Tensor, Tensor]:
    (*size, packed), dtype = qkv.shape, accumulation_dtype(qkv.dtype)
    dim = packed // (3 * num_heads)
    weights = (qkv.shape[0], num_heads, dim, dim) if keep else (0,)
    return qkv.new_empty((*size, packed // 3)), qkv.new_empty(weights, dtype=dtype)


@torch.library.custom_op(
    "backbones::channel_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor weights, SymInt num_heads, bool mix_values, "
    "float? scale) -> Tensor",
)
def _backward(
    grad: Tensor,
    qkv: Tensor,
    weights: Tensor,
    num_heads: int,
    mix_values: bool,
    scale: float | None,
) -> Tensor:
    if qkv.dtype == torch.float64:
        return _backward_pytorch(grad, qkv, weights, num_heads, mix_values, scale)
    launch = kernels("channel_attention", qkv)
    return launch.backward(grad, qkv, weights, num_heads, mix_values, scale)


_backward.register_kernel("cpu")(_backward_pytorch)
_backward.register_kernel("mps")(_backward_pytorch)


@_backward.register_fake
def _(
    grad: Tensor,
    qkv: Tensor,
    weights: Tensor,
    num_heads: int,
    mix_values: bool,
    scale: float | None,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    qkv, *ctx.args, keep = inputs
    ctx.save_for_backward(qkv, output[1] if keep else None)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    qkv, weights = ctx.saved_tensors
    if weights is None:
        weights = _forward(qkv, *ctx.args, True)[1]
    grad_qkv = _backward(grad.contiguous(), qkv, weights, *ctx.args)
    return grad_qkv, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _validate(qkv: Tensor, num_heads: int) -> None:
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads} must be positive")
    if qkv.ndim != 4 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"qkv {tuple(qkv.shape)} must be a map (B, H, W, 3C) with channels a multiple of "
            f"3 * num_heads = {3 * num_heads}"
        )


def channel_attention(
    qkv: Tensor, num_heads: int, mix_values: bool = False, scale: float | None = None
) -> Tensor:
    """Attend between the channels of a map, over all of its tokens.

    Args:
        qkv: Packed queries, keys and values `(B, H, W, 3C)`, each head by head.
        num_heads: Heads, of `D = C / num_heads` channels.
        mix_values: Scores from queries and keys, and values mixed, as in Florence-2; False takes
            the scores from keys and values and mixes the queries, as DaViT's classifiers do.
        scale: Factor of the scores before the softmax. Default: `(H * W) ** -0.5` with
            `mix_values`, else `D ** -0.5`.

    Returns:
        The map `(B, H, W, C)`, contiguous, channels head by head.

    Layout:
        All strides are free; the kernels copy only if those of the channels are not one.

    Numerics:
        float32, bfloat16 or float16, summed in float32, by Triton kernels on a GPU; float64, and
        all types on a CPU, by PyTorch. Under autocast `qkv` is cast to its type first. float32
        products follow `torch.set_float32_matmul_precision`. The backward pass needs `qkv` and
        the weights `(B, num_heads, D, D)` in float32, which are written only if `qkv` requires a
        gradient.

    Gradients:
        For `qkv`, deterministic, once differentiable.

    Raises:
        ValueError: Shapes that do not fit together.

    Source:
        DaViT, arXiv 2204.03645, section 3.2.
    """
    if torch.jit.is_scripting():
        keep = torch.is_grad_enabled() and qkv.requires_grad
        return torch.ops.backbones.channel_attention(qkv, num_heads, mix_values, scale, keep)[0]
    else:
        return _dispatch(qkv, num_heads, mix_values, scale)


def _dispatch(qkv: Tensor, num_heads: int, mix_values: bool, scale: float | None) -> Tensor:
    # a trace serves training and inference
    keep = True
    if not isinstance(qkv, torch.fx.Proxy):
        (qkv,) = autocast(qkv)
        # and sees sizes as tensors
        if not torch.jit.is_tracing():
            _validate(qkv, num_heads)
            keep = torch.is_grad_enabled() and qkv.requires_grad
        if reference_in_use():
            return channel_attention_reference(qkv, num_heads, mix_values, scale)
        if runs_at_once(qkv):
            return _forward_pytorch(qkv, num_heads, mix_values, scale, False)[0]
    # through the packet, which torch.fx records; a call of the Python object it would not
    return torch.ops.backbones.channel_attention(qkv, num_heads, mix_values, scale, keep)[0]
