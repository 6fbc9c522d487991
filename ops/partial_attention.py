"""Single-head attention over part of the channels (SHViT).

SHViT (arXiv 2401.16456, section 3.2) attends with one head over the first `P` of `C` channels and
passes the others through. With `N = H * W` tokens, `q` and `k` of `D` channels, `v` of `P`:

    A = softmax(scale * q k^T)                 (N, N), rows sum to one
    y = relu(concat(A v, x[P:]))               (N, C)

and backward, with `g` the gradient of `y` where `y > 0`, else 0:

    dv = A^T g[:P]      dA = g[:P] v^T      dS = A * (dA - rowsum(A * dA))
    dq = scale * dS k   dk = scale * dS^T q     dx = concat(0, g[P:])
"""

from __future__ import annotations

from collections.abc import Iterator

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

# scores held at once, per block of queries: 4 MB in float32, so that large maps stay in cache
_BLOCK_SCORES = 1 << 20


def partial_attention_reference(
    qkv: Tensor, x: Tensor, qk_dim: int = 16, scale: float | None = None
) -> Tensor:
    """Compute `partial_attention` in plain, differentiable PyTorch; holds all `N * N` scores."""
    value_dim = qkv.shape[-1] - 2 * qk_dim
    q, k, v = qkv.flatten(1, 2).split([qk_dim, qk_dim, value_dim], dim=-1)
    scores = (q @ k.transpose(1, 2)) * (qk_dim**-0.5 if scale is None else scale)
    attended = (scores.softmax(dim=-1) @ v).unflatten(1, x.shape[1:3])
    return torch.cat([attended, x[..., value_dim:]], dim=-1).relu()


def _tokens(qkv: Tensor, qk_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a packed `(B, H, W, 2D + P)` map into q, k `(B, N, D)` and v `(B, N, P)`."""
    tokens = qkv.flatten(1, 2).to(accumulation_dtype(qkv.dtype))
    q, k, v = tokens.split_with_sizes([qk_dim, qk_dim, tokens.shape[-1] - 2 * qk_dim], dim=-1)
    return q, k, v


def _query_blocks(q: Tensor) -> Iterator[slice]:
    """Slices over the N queries of `(B, N, D)` that bound the scores held at once."""
    batch, n = q.shape[:2]
    rows = max(1, _BLOCK_SCORES // max(1, batch * n))
    for start in range(0, n, rows):
        yield slice(start, start + rows)


def _forward_pytorch(
    qkv: Tensor, x: Tensor, qk_dim: int, scale: float, keep: bool = True
) -> tuple[Tensor, Tensor]:
    with outside_autocast(qkv):
        q, k, v = _tokens(qkv, qk_dim)
        attended, lse = [], q.new_empty(x.shape[:3] if keep else (0,))
        for rows in _query_blocks(q):
            scores = torch.bmm(q[:, rows], k.mT).mul_(scale)
            if keep:
                lse.flatten(1)[:, rows] = scores.logsumexp(dim=-1)
            attended.append(torch.bmm(scores.softmax(dim=-1), v))
        whole = attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)
        whole = whole.to(x.dtype).unflatten(1, x.shape[1:3])
        out = torch.cat([whole, x[..., v.shape[-1] :]], dim=-1).relu_()
        return out, lse


def _backward_pytorch(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, qk_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    with outside_autocast(qkv):
        q, k, v = _tokens(qkv, qk_dim)
        value_dim, rows_lse = v.shape[-1], lse.flatten(1, 2)[..., None]
        grad_x = torch.where(out > 0, grad, 0)
        grad_attended = grad_x[..., :value_dim].flatten(1, 2).to(q.dtype)

        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows in _query_blocks(q):
            scores = (q[:, rows] @ k.transpose(1, 2)).mul_(scale)
            attention = scores.sub_(rows_lse[:, rows]).exp_()
            dv += attention.transpose(1, 2) @ grad_attended[:, rows]
            da = grad_attended[:, rows] @ v.transpose(1, 2)
            ds = attention * (da - (attention * da).sum(dim=-1, keepdim=True)) * scale
            dq[:, rows] = ds @ k
            dk += ds.transpose(1, 2) @ q[:, rows]
        # only now: grad_attended is a view of these channels
        grad_x[..., :value_dim] = 0
        grad_qkv = torch.cat([dq, dk, dv], dim=-1).to(qkv.dtype).view(qkv.shape)
        return grad_qkv, grad_x


@torch.library.custom_op("backbones::partial_attention", mutates_args=())
def _forward(qkv: Tensor, x: Tensor, qk_dim: int, scale: float) -> tuple[Tensor, Tensor]:
    # the matrix units that Triton reaches have no float64 on most devices
    if qkv.dtype == torch.float64:
        return _forward_pytorch(qkv, x, qk_dim, scale)
    return kernels("partial_attention", qkv).forward(qkv, x, qk_dim, scale)


# one by one: of several devices at once PyTorch's set_kernel_enabled knows the last only
_forward.register_kernel("cpu")(_forward_pytorch)
_forward.register_kernel("mps")(_forward_pytorch)


@_forward.register_fake
def _(qkv: Tensor, x: Tensor, qk_dim: int, scale: float) -> tuple[Tensor, Tensor]:
    # of all sizes, though small maps could do without: a branch on sizes would be one on graphs
    lse = x.new_empty(x.shape[:3], dtype=accumulation_dtype(x.dtype))
    return x.new_empty(x.shape), lse


@torch.library.custom_op("backbones::partial_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, qk_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    if qkv.dtype == torch.float64:
        return _backward_pytorch(grad, qkv, out, lse, qk_dim, scale)
    launch = kernels("partial_attention", qkv)
    return launch.backward(grad, qkv, out, lse, qk_dim, scale)


_backward.register_kernel("cpu")(_backward_pytorch)
_backward.register_kernel("mps")(_backward_pytorch)


@_backward.register_fake
def _(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, qk_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), out.new_empty(out.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    qkv, _, ctx.qk_dim, ctx.scale = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    qkv, out, lse = ctx.saved_tensors
    return *_backward(grad.contiguous(), qkv, out, lse, ctx.qk_dim, ctx.scale), None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _validate(qkv: Tensor, x: Tensor, qk_dim: int) -> None:
    if qkv.ndim != 4 or x.ndim != 4 or qkv.shape[:3] != x.shape[:3]:
        raise ValueError(
            f"qkv {tuple(qkv.shape)} and x {tuple(x.shape)} must be NHWC maps of one batch and size"
        )
    value_dim = qkv.shape[-1] - 2 * qk_dim
    if not 0 < value_dim <= x.shape[-1]:
        raise ValueError(
            f"qkv has {qkv.shape[-1]} channels, {value_dim} of them values: give between "
            f"{2 * qk_dim + 1} and {2 * qk_dim + x.shape[-1]} for qk_dim={qk_dim} and this x"
        )
    if qkv.dtype != x.dtype:
        raise ValueError(f"qkv is {qkv.dtype} but x is {x.dtype}: cast one of them")


def partial_attention(
    qkv: Tensor, x: Tensor, qk_dim: int = 16, scale: float | None = None
) -> Tensor:
    """Attend with one head over the first channels of a map, pass the rest, apply ReLU.

    Args:
        qkv: Packed queries, keys and values `(B, H, W, 2 * qk_dim + P)`, in this order.
        x: The map `(B, H, W, C)`, `C >= P`, whose channels from `P` on pass through.
        qk_dim: Channels of a query and of a key.
        scale: Factor of the scores before the softmax. Default: `qk_dim ** -0.5`.

    Returns:
        `relu(concat(softmax(scale * q k^T) v, x[..., P:]))`, `(B, H, W, C)`, contiguous.

    Layout:
        All strides are free; the kernels copy a map only if its stride of the channels is not one.

    Numerics:
        float32, bfloat16 or float16, accumulated in float32, by Triton kernels on a GPU; float64,
        and all types on a CPU, by PyTorch. Under autocast both maps are cast to its type first.
        float32 products follow `torch.set_float32_matmul_precision`. `qkv`, the output and the
        logsumexp of the scores are kept for the backward pass: memory grows with `N = H * W`, not
        `N ** 2`. NaN passes through the ReLU.

    Gradients:
        For `qkv` and `x`, deterministic, once differentiable.

    Raises:
        ValueError: Shapes or types that do not fit together.

    Source:
        SHViT, arXiv 2401.16456, section 3.2.
    """
    factor = qk_dim**-0.5 if scale is None else scale
    if torch.jit.is_scripting():
        return torch.ops.backbones.partial_attention(qkv, x, qk_dim, factor)[0]
    else:
        return _dispatch(qkv, x, qk_dim, factor)


def _dispatch(qkv: Tensor, x: Tensor, qk_dim: int, scale: float) -> Tensor:
    if not isinstance(qkv, torch.fx.Proxy):
        qkv, x = autocast(qkv, x)
        # a trace sees sizes as tensors
        if not torch.jit.is_tracing():
            _validate(qkv, x, qk_dim)
        if reference_in_use():
            return partial_attention_reference(qkv, x, qk_dim, scale)
        if runs_at_once(qkv):
            return _forward_pytorch(qkv, x, qk_dim, scale, keep=False)[0]
    # through the packet, which torch.fx records; a call of the Python object it would not
    return torch.ops.backbones.partial_attention(qkv, x, qk_dim, scale)[0]
