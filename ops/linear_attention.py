"""Linear attention with a bounded denominator (L2ViT's linear global attention).

L2ViT (arXiv 2501.16182) replaces the softmax by the feature map relu, so that the keys and values
of all `N = H * W` tokens can be summed before any query sees them: the cost is linear in `N`. With
the temperature `t` and, for one head, `q`, `k`, `v` `(N, D)`:

    fq = relu(q)    fk = relu(k)    S = sum of fk v^T    (D, D)    z = sum of fk    (D)
    den = max(fq . z, 100)          y = t (S^T fq) / den

The bound is not an epsilon: on small maps many denominators lie below it, and the result changes
with the scale of queries and keys. Backward, with `g` the gradient of `y`:

    u = S g / den       dS = t sum of fq (g / den)^T    dz = sum of dden fq
    dden = -t (fq . u) / den where fq . z >= 100, else 0
    dfq = t u + dden z              dv = dS^T fk        dfk = dS v + dz
    dt = <S, dS> / t = sum of fq . u
    dq = dfq where q > 0            dk = dfk where k > 0
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._common import accumulation_dtype, autocast, kernels, reference_in_use, runs_at_once
from ._heads import pack_heads, split_heads


def linear_attention_reference(
    qkv: Tensor, temperature: Tensor, min_denominator: float = 100.0
) -> Tensor:
    """Compute `linear_attention` in plain, differentiable PyTorch."""
    with torch.autocast(qkv.device.type, enabled=False):
        q, k, v = split_heads(qkv, 3, temperature.shape[0])
        q, k = q.relu(), k.relu()
        raw = q @ k.sum(dim=-2, keepdim=True).transpose(-1, -2)
        # unlike that of `clamp`, its gradient at the bound is the same in all versions of PyTorch
        den = torch.where(raw < min_denominator, min_denominator, raw)
        # the sum, which is small, takes the factor
        matrix = k.transpose(-1, -2) @ v * temperature.to(q.dtype)[:, None, None]
        return pack_heads([q @ matrix / den], qkv)


def _forward_pytorch(
    qkv: Tensor, temperature: Tensor, min_denominator: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """The output `(B, H, W, C)`, and S over z `(B, heads, D + 1, D)` if it is kept.

    An image at a time: its heads are factors of products as they lie, those of a batch would first
    be copied.
    """
    dtype, heads = accumulation_dtype(qkv.dtype), temperature.shape[0]
    tokens = qkv.flatten(1, 2).unflatten(-1, (3, heads, -1))
    out, factor = tokens.new_empty(tokens[:, :, 0].shape), temperature.to(dtype)[:, None, None]
    batch, dim = tokens.shape[0], tokens.shape[-1]
    state = tokens.new_empty((batch, heads, dim + 1, dim) if keep else (0,), dtype=dtype)
    with torch.autocast(qkv.device.type, enabled=False):
        for index, image in enumerate(tokens.unbind(0)):
            q, k = image[:, :2].to(dtype).relu().permute(1, 2, 0, 3).unbind(0)
            v = image[:, 2].to(dtype).transpose(0, 1)
            matrix, vector = torch.bmm(k.mT, v), k.sum(dim=1, keepdim=True)
            den = torch.bmm(q, vector.mT).clamp_(min=min_denominator)
            torch.div(torch.bmm(q, factor * matrix), den, out=out[index].transpose(0, 1))
            if keep:
                torch.cat([matrix, vector], dim=1, out=state[index])
    return out.flatten(2).unflatten(1, qkv.shape[1:3]), state


def _backward_pytorch(
    grad: Tensor, qkv: Tensor, temperature: Tensor, state: Tensor, min_denominator: float
) -> tuple[Tensor, Tensor]:
    with torch.autocast(qkv.device.type, enabled=False):
        heads = temperature.shape[0]
        q, k, v = split_heads(qkv, 3, heads)
        (g,) = split_heads(grad, 1, heads)
        matrix, vector = state[..., :-1, :], state[..., -1:, :]
        factor = temperature.to(q.dtype)[:, None, None]
        fq, fk = q.relu(), k.relu()
        raw = fq @ vector.mT
        den = raw.clamp(min=min_denominator)
        g = g / den
        du = g @ (factor * matrix).mT
        dden = (fq * du).sum(dim=-1, keepdim=True).div_(den).neg_()
        dden = dden.where(raw >= min_denominator, 0.0)
        dmatrix, dvector = fq.mT @ g, dden.mT @ fq
        dtemperature = (matrix * dmatrix).sum(dim=(0, 2, 3))
        dmatrix *= factor
        through_relu = torch.ops.aten.threshold_backward
        dq = through_relu(du.addcmul_(dden, vector), fq, 0)
        dk = through_relu((v @ dmatrix.mT).add_(dvector), fk, 0)
        grad_qkv = pack_heads([dq, dk, fk @ dmatrix], qkv)
        return grad_qkv, dtemperature.to(temperature.dtype)


@torch.library.custom_op(
    "backbones::linear_attention",
    mutates_args=(),
    schema="(Tensor qkv, Tensor temperature, float min_denominator, bool keep) -> (Tensor, Tensor)",
)
def _forward(
    qkv: Tensor, temperature: Tensor, min_denominator: float, keep: bool
) -> tuple[Tensor, Tensor]:
    # the matrix units that Triton reaches have no float64 on most devices
    if qkv.dtype == torch.float64:
        return _forward_pytorch(qkv, temperature, min_denominator, keep)
    return kernels("linear_attention", qkv).forward(qkv, temperature, min_denominator, keep)


# one by one: of several devices at once PyTorch's set_kernel_enabled knows the last only
_forward.register_kernel("cpu")(_forward_pytorch)
_forward.register_kernel("mps")(_forward_pytorch)


@_forward.register_fake
def _(
    qkv: Tensor, temperature: Tensor, min_denominator: float, keep: bool
) -> tuple[Tensor, Tensor]:
    (*size, packed), heads = qkv.shape, temperature.shape[0]
    dim = packed // (3 * heads)
    state = (qkv.shape[0], heads, dim + 1, dim) if keep else (0,)
    out = qkv.new_empty((*size, packed // 3))
    return out, qkv.new_empty(state, dtype=accumulation_dtype(qkv.dtype))


@torch.library.custom_op(
    "backbones::linear_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor temperature, Tensor state, float min_denominator) "
    "-> (Tensor, Tensor)",
)
def _backward(
    grad: Tensor, qkv: Tensor, temperature: Tensor, state: Tensor, min_denominator: float
) -> tuple[Tensor, Tensor]:
    if qkv.dtype == torch.float64:
        return _backward_pytorch(grad, qkv, temperature, state, min_denominator)
    launch = kernels("linear_attention", qkv)
    return launch.backward(grad, qkv, temperature, state, min_denominator)


_backward.register_kernel("cpu")(_backward_pytorch)
_backward.register_kernel("mps")(_backward_pytorch)


@_backward.register_fake
def _(
    grad: Tensor, qkv: Tensor, temperature: Tensor, state: Tensor, min_denominator: float
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), temperature.new_empty(temperature.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    qkv, temperature, ctx.min_denominator, keep = inputs
    ctx.save_for_backward(qkv, temperature, output[1] if keep else None)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    qkv, temperature, state = ctx.saved_tensors
    if state is None:
        state = _forward(qkv, temperature, ctx.min_denominator, True)[1]
    grads = _backward(grad.contiguous(), qkv, temperature, state, ctx.min_denominator)
    return *grads, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _validate(qkv: Tensor, temperature: Tensor, min_denominator: float) -> None:
    if temperature.ndim != 1 or not temperature.shape[0]:
        raise ValueError(
            f"temperature {tuple(temperature.shape)} must be a vector (heads,), a factor a head"
        )
    heads = temperature.shape[0]
    if qkv.ndim != 4 or qkv.shape[-1] % (3 * heads):
        raise ValueError(
            f"qkv {tuple(qkv.shape)} must be a map (B, H, W, 3C) with channels a multiple of "
            f"3 * heads = {3 * heads}, of as many heads as temperature has factors"
        )
    if not 0 < min_denominator < math.inf:
        raise ValueError(
            f"min_denominator={min_denominator} must be positive and finite: a query without a "
            "positive channel is divided by it"
        )


def linear_attention(qkv: Tensor, temperature: Tensor, min_denominator: float = 100.0) -> Tensor:
    """Attend to all tokens of a map at a cost that is linear in their number.

    Args:
        qkv: Packed queries, keys and values `(B, H, W, 3C)`, each head by head.
        temperature: Factor of the output of every head `(heads,)`; heads have `D = C / heads`
            channels.
        min_denominator: What denominators below it are raised to.

    Returns:
        The map `(B, H, W, C)`, contiguous, channels head by head; zero where no channel of a query
        is positive.

    Layout:
        All strides are free; the kernels copy only if those of the channels are not one.

    Numerics:
        float32, bfloat16 or float16 by Triton kernels on a GPU; float64, and all types on a CPU,
        by PyTorch. `S`, `z` and denominators are summed and kept in float32; for products the
        kernels round `S` to the type of `qkv`, in float16 in units of its largest element, and add
        the product with what was rounded off for the gradient of queries, most of which cancels.
        Under autocast `qkv` is cast to its type first; `temperature` is not. float32 products
        follow `torch.set_float32_matmul_precision`. The backward pass needs the arguments and `S`
        over `z`, `(B, heads, D + 1, D)` in float32, written only if a gradient is required.

    Gradients:
        For `qkv` and `temperature`, deterministic, once differentiable. It passes a denominator
        that is at least `min_denominator`.

    Raises:
        ValueError: Shapes that do not fit together, or a `min_denominator` that is not positive.

    Source:
        L2ViT, arXiv 2501.16182.
    """
    if torch.jit.is_scripting():
        keep = torch.is_grad_enabled() and (qkv.requires_grad or temperature.requires_grad)
        return torch.ops.backbones.linear_attention(qkv, temperature, min_denominator, keep)[0]
    else:
        return _dispatch(qkv, temperature, min_denominator)


def _dispatch(qkv: Tensor, temperature: Tensor, min_denominator: float) -> Tensor:
    # a trace serves training and inference
    keep = True
    if not isinstance(qkv, torch.fx.Proxy):
        (qkv,) = autocast(qkv)
        # and sees sizes as tensors
        if not torch.jit.is_tracing():
            _validate(qkv, temperature, min_denominator)
            keep = torch.is_grad_enabled() and (qkv.requires_grad or temperature.requires_grad)
        if reference_in_use():
            return linear_attention_reference(qkv, temperature, min_denominator)
        if runs_at_once(qkv):
            return _forward_pytorch(qkv, temperature, min_denominator, False)[0]
    # through the packet, which torch.fx records; a call of the Python object it would not
    return torch.ops.backbones.linear_attention(qkv, temperature, min_denominator, keep)[0]
