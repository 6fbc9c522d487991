"""Linear attention whose keys are weighted by their importance (RAVLT's RALA).

RALA (arXiv 2411.07635) sums the keys and values of all `N = H * W` tokens into one matrix `S`, so
that the cost is linear in `N`; a softmax over the tokens weights the keys, which raises the rank of
`S`. With `phi(t) = elu(t) + 1`, and for one head of `q`, `k`, `v` `(N, D)` and the rotation `R` of
a token by its position (`apply_rotary`):

    fq = phi(q)    fk = phi(k)    mu = mean of fq over the tokens
    a = softmax over the tokens of D^-1/2 fk . mu
    S = sum of R(a fk) v^T    (D, D)        c = sum of a fk    (D)
    core = R(fq)^T S / (fq . c + 1e-6)      y = (core + addend) * gate

The paper's weights are `N a` and its sums divide by `N`; both cancel, and without them nothing
grows with the map. Backward, with `g` the gradient of `core` over its denominator `den`:

    u = R^-1(S g)       dden = -(fq . u) / den      dS = sum of R(fq) g^T       dc = sum of dden fq
    dv = dS^T R(a fk)   t = R^-1(dS v) + dc         T = <S, dS> + c . dc
    ds = D^-1/2 a (fk . t - T)      dfk = a t + ds mu       dmu = sum of ds fk
    dfq = u + dden c + dmu / N      dq = dfq min(fq, 1)     dk = dfk min(fk, 1)

`T` is the sum of `a (fk . t)`: the softmax costs no pass over the tokens of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import accumulation_dtype, autocast, kernels, reference_in_use
from ._heads import pack_heads, split_heads
from ._rotary import angles, check_rotary, turned

# added to the denominator, as the official code does
EPS = 1e-6


def _pair_angles(rotary: Tensor, qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all pairs of all tokens, each `(N, D / 2)`."""
    table = rotary.to(accumulation_dtype(qkv.dtype))
    cos, sin = angles(table, qkv.shape[1], qkv.shape[2])
    return cos.flatten(0, 2), sin.flatten(0, 2)


def _phi(x: Tensor) -> Tensor:
    """elu(x) + 1, without cancellation where x is negative."""
    return x.clamp(max=0).exp() + x.relu()


def _phi_(x: Tensor) -> Tensor:
    """The same in place."""
    positive = x.relu()
    return x.clamp_(max=0).exp_().add_(positive)


def rank_augmented_attention_reference(
    qkv: Tensor,
    rotary: Tensor,
    num_heads: int,
    addend: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """Compute `rank_augmented_attention` in plain, differentiable PyTorch."""
    q, k, v, *gate = split_heads(qkv, 3 + gated, num_heads)
    cos, sin = _pair_angles(rotary, qkv)
    fq, fk = _phi(q), _phi(k)
    mean = fq.mean(dim=-2, keepdim=True)
    scores = fk @ mean.transpose(-1, -2) * q.shape[-1] ** -0.5
    weighted = fk * scores.softmax(dim=-2)
    matrix = turned(weighted, cos, sin).transpose(-1, -2) @ v
    vector = weighted.sum(dim=-2, keepdim=True)
    out = turned(fq, cos, sin) @ matrix / (fq @ vector.transpose(-1, -2) + EPS)
    if addend is not None:
        out = out + split_heads(addend, 1, num_heads)[0]
    if gated:
        out = out * gate[0]
    return pack_heads([out], qkv)


def _empty_results(
    qkv: Tensor, num_heads: int, gated: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the output, S over c, mu, and the logsumexp of the scores."""
    (*size, packed), dtype = qkv.shape, accumulation_dtype(qkv.dtype)
    out = qkv.new_empty((*size, packed // (3 + gated)))
    heads, dim = (qkv.shape[0], num_heads), out.shape[-1] // num_heads
    state = qkv.new_empty((*heads, dim + 1, dim) if keep else 0, dtype=dtype)
    mean = qkv.new_empty((*heads, dim) if keep else 0, dtype=dtype)
    return out, state, mean, qkv.new_empty(heads if keep else 0, dtype=dtype)


def _forward_pytorch(
    qkv: Tensor, rotary: Tensor, addend: Tensor | None, num_heads: int, gated: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, state, mean, lse = _empty_results(qkv, num_heads, gated, keep)
    wide = out.to(state.dtype).flatten(1, 2).unflatten(-1, (num_heads, -1))
    with torch.autocast(qkv.device.type, enabled=False):
        turns = torch.complex(*_pair_angles(rotary, qkv))
        tokens = qkv.flatten(1, 2).unflatten(-1, (3 + gated, num_heads, -1))
        # one by one, so that an image stays in cache
        for i in range(len(qkv)):
            results = _attend_image(tokens[i], turns, wide[i])
            if keep:
                state[i], mean[i] = torch.cat(results[:2], dim=-2), results[2].squeeze(-2)
                lse[i] = results[3].logsumexp(dim=(-2, -1))
        if addend is not None:
            wide.add_(addend.reshape(wide.shape))
        if gated:
            wide.mul_(tokens[:, :, 3])
    return wide.view(out.shape).to(out.dtype), state, mean, lse


def _attend_image(
    tokens: Tensor, turns: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write to `out` `(N, heads, D)` what tokens `(N, 3 or 4, heads, D)` attend to.

    Args:
        tokens: Packed tokens of an image.
        turns: The rotation of every pair of channels of every token, complex `(N, D / 2)`.
        out: What is written, in the type of the sums.

    Returns:
        S, c, mu, and the scores of the tokens.
    """
    count, heads, dim = out.shape
    both = out.new_empty(2, heads, count, dim).copy_(tokens[:, :2].permute(1, 2, 0, 3))
    fq, fk = _phi_(both)
    mean = fq.mean(dim=-2, keepdim=True)
    scores = (fk @ mean.mT).mul_(dim**-0.5)
    vector = fk.mul_(scores.softmax(dim=-2)).sum(dim=-2, keepdim=True)
    den = (fq @ vector.mT).add_(EPS)
    torch.view_as_complex(both.unflatten(-1, (-1, 2))).mul_(turns)
    matrix = fk.mT @ tokens[:, 2].transpose(0, 1).to(out.dtype)
    out.copy_((fq @ matrix).div_(den).transpose(0, 1))
    return matrix, vector, mean, scores


def _backward_pytorch(
    grad: Tensor,
    qkv: Tensor,
    rotary: Tensor,
    addend: Tensor | None,
    state: Tensor,
    mean: Tensor,
    lse: Tensor,
    num_heads: int,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(qkv.device.type, enabled=False):
        q, k, v, *gate = split_heads(qkv, 3 + gated, num_heads)
        (g,) = split_heads(grad, 1, num_heads)
        cos, sin = _pair_angles(rotary, qkv)
        mean, matrix, vector = mean.unsqueeze(-2), state[..., :-1, :], state[..., -1:, :]
        factor = q.shape[-1] ** -0.5
        fq, fk = _phi(q), _phi(k)
        turned_q, den = turned(fq, cos, sin), fq @ vector.mT + EPS
        grad_gate, grad_addend = [], qkv.new_empty(0)
        if gated:
            core = turned_q @ matrix / den
            total = core if addend is None else core + split_heads(addend, 1, num_heads)[0]
            grad_gate, g = [g * total], g * gate[0]
            if addend is not None:
                grad_addend = pack_heads([g], addend)
        g = g / den
        u = turned(g @ matrix.mT, cos, -sin)
        dden = -(fq * u).sum(dim=-1, keepdim=True) / den
        dmatrix, dvector = turned_q.mT @ g, dden.mT @ fq

        weights = (fk @ mean.mT * factor - lse[..., None, None]).exp()
        dv = turned(fk, cos, sin) @ dmatrix * weights
        t = turned(v @ dmatrix.mT, cos, -sin) + dvector
        constant = (matrix * dmatrix).sum(dim=(-2, -1)) + (vector * dvector).sum(dim=(-2, -1))
        ds = weights * ((fk * t).sum(dim=-1, keepdim=True) - constant[..., None, None]) * factor
        dk = (weights * t + ds * mean) * fk.clamp(max=1)
        dmean = ds.mT @ fk / (qkv.shape[1] * qkv.shape[2])
        dq = (u + dden * vector + dmean) * fq.clamp(max=1)
        return pack_heads([dq, dk, dv, *grad_gate], qkv), grad_addend


@torch.library.custom_op(
    "backbones::rank_augmented_attention",
    mutates_args=(),
    schema="(Tensor qkv, Tensor rotary, Tensor? addend, SymInt num_heads, bool gated, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    qkv: Tensor, rotary: Tensor, addend: Tensor | None, num_heads: int, gated: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # the matrix units that Triton reaches have no float64 on most devices
    if qkv.dtype == torch.float64:
        return _forward_pytorch(qkv, rotary, addend, num_heads, gated, keep)
    launch = kernels("rank_augmented_attention", qkv)
    return launch.forward(qkv, rotary, addend, num_heads, gated, keep)


# one by one: of several devices at once PyTorch's set_kernel_enabled knows the last only
_forward.register_kernel("cpu")(_forward_pytorch)
_forward.register_kernel("mps")(_forward_pytorch)


@_forward.register_fake
def _(
    qkv: Tensor, rotary: Tensor, addend: Tensor | None, num_heads: int, gated: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_results(qkv, num_heads, gated, keep)


@torch.library.custom_op(
    "backbones::rank_augmented_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor rotary, Tensor? addend, Tensor state, Tensor mean, "
    "Tensor lse, SymInt num_heads, bool gated) -> (Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    qkv: Tensor,
    rotary: Tensor,
    addend: Tensor | None,
    state: Tensor,
    mean: Tensor,
    lse: Tensor,
    num_heads: int,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    if qkv.dtype == torch.float64:
        return _backward_pytorch(grad, qkv, rotary, addend, state, mean, lse, num_heads, gated)
    launch = kernels("rank_augmented_attention", qkv)
    return launch.backward(grad, qkv, rotary, addend, state, mean, lse, num_heads, gated)


_backward.register_kernel("cpu")(_backward_pytorch)
_backward.register_kernel("mps")(_backward_pytorch)


@_backward.register_fake
def _(
    grad: Tensor,
    qkv: Tensor,
    rotary: Tensor,
    addend: Tensor | None,
    state: Tensor,
    mean: Tensor,
    lse: Tensor,
    num_heads: int,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    grad_addend = qkv.new_empty(0) if addend is None or not gated else addend.new_empty(grad.shape)
    return qkv.new_empty(qkv.shape), grad_addend


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    qkv, rotary, addend, *ctx.args, keep = inputs
    ctx.gated, ctx.added = ctx.args[1], addend is not None
    ctx.save_for_backward(
        qkv, rotary, addend if ctx.gated else None, *(output[1:] if keep else (None,) * 3)
    )
    ctx.mark_non_differentiable(*output[1:])


def _autograd(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    qkv, rotary, addend, *states = ctx.saved_tensors
    if states[0] is None:
        states = _forward(qkv, rotary, addend, *ctx.args, True)[1:]
    grad = grad.contiguous()
    grad_qkv, grad_addend = _backward(grad, qkv, rotary, addend, *states, *ctx.args)
    # what is added and not gated has the gradient of the output
    grad_addend = grad_addend if ctx.gated else grad
    return grad_qkv, None, grad_addend if ctx.added else None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _validate(
    qkv: Tensor, rotary: Tensor, num_heads: int, addend: Tensor | None, gated: bool
) -> None:
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads} must be positive")
    parts = 3 + gated
    if qkv.ndim != 4 or qkv.shape[-1] % (4 * parts * num_heads):
        raise ValueError(
            f"qkv {tuple(qkv.shape)} must be a map (B, H, W, {parts}C) with channels a multiple of "
            f"{parts} * num_heads * 4 = {4 * parts * num_heads}"
        )
    channels = qkv.shape[-1] // parts
    check_rotary(rotary, qkv.shape[1], qkv.shape[2], channels // num_heads)
    expected = (*qkv.shape[:3], channels)
    if addend is not None and tuple(addend.shape) != expected:
        raise ValueError(f"addend {tuple(addend.shape)} must be {expected}, as the output is")


def rank_augmented_attention(
    qkv: Tensor,
    rotary: Tensor,
    num_heads: int,
    addend: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """Attend to all tokens of a map at a cost that is linear in their number.

    Args:
        qkv: Packed queries, keys and values `(B, H, W, 3C)`, each head by head; with `gated` and
            behind them the gate: `(B, H, W, 4C)`.
        rotary: Table of `rotary_table` `(2, S, D / 4)`, S at least `max(H, W)`.
        num_heads: Heads, of `D = C / num_heads` channels, a multiple of 4.
        addend: What is added to the result before the gate, `(B, H, W, C)`; RAVLT's is a
            convolution of the values.
        gated: Multiply the result by the gate, which has no activation.

    Returns:
        The map `(B, H, W, C)`, contiguous, channels head by head.

    Layout:
        All strides are free; the kernels copy only if those of the channels are not one.

    Numerics:
        float32, bfloat16 or float16, summed in float32, by Triton kernels on a GPU; float64, and
        all types on a CPU, by PyTorch. Under autocast `qkv` and `addend` are cast to its type
        first; `rotary` is not. float32 products follow `torch.set_float32_matmul_precision`. The
        backward pass needs the arguments and, in float32, `S`, `c` and the mean query of every head
        and one number of its softmax, which are written only if a gradient is required.

    Gradients:
        For `qkv` and `addend`, deterministic, once differentiable; none for `rotary`.

    Raises:
        ValueError: Shapes that do not fit together.

    Source:
        RAVLT, arXiv 2411.07635.
    """
    if torch.jit.is_scripting():
        keep = torch.is_grad_enabled() and (
            qkv.requires_grad or (addend is not None and addend.requires_grad)
        )
        return torch.ops.backbones.rank_augmented_attention(
            qkv, rotary, addend, num_heads, gated, keep
        )[0]
    else:
        return _dispatch(qkv, rotary, num_heads, addend, gated)


def _dispatch(
    qkv: Tensor, rotary: Tensor, num_heads: int, addend: Tensor | None, gated: bool
) -> Tensor:
    # a trace serves training and inference
    keep = True
    if not isinstance(qkv, torch.fx.Proxy):
        qkv, addend = autocast(qkv, addend)
        # and sees sizes as tensors
        if not torch.jit.is_tracing():
            _validate(qkv, rotary, num_heads, addend, gated)
            needed = qkv.requires_grad or (addend is not None and addend.requires_grad)
            keep = torch.is_grad_enabled() and needed
        if reference_in_use():
            return rank_augmented_attention_reference(qkv, rotary, num_heads, addend, gated)
    # through the packet, which torch.fx records; a call of the Python object it would not
    return torch.ops.backbones.rank_augmented_attention(
        qkv, rotary, addend, num_heads, gated, keep
    )[0]
