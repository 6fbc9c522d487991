"""Attention of every pixel to a window around it (MSA-Conv, Neighborhood Attention).

With `q`, `k`, `v` of one head `(H, W, D)`, windows of `kh x kw` slots (both odd), and the slot
`(i, j)` of pixel `(y, x)` at `(y + (i - kh // 2) dy, x + (j - kw // 2) dx)`:

    s_ij = scale * q[y, x] . k[slot]        P = softmax of s over all slots
    out[y, x] = sum of P_ij v[slot]

A slot outside the map has the score 0 and the value 0 and takes part in the softmax (MSA-Conv's
zero padding), or there is none, because windows are shifted inside the map ("clamp", the rule of
Neighborhood Attention, see `_neighborhood.py`). A head with the shift `(sy, sx)` attends on the map
rolled by `(-sy, -sx)`, and its output is rolled back: the border of the map is elsewhere, and what
it parted are neighbors.

Backward, with `g` the gradient of `out`, `lse` the logsumexp of a pixel's scores, those outside
included, and sums over the pixels whose windows contain a key:

    P = exp(s - lse)            dS = P (g . v - g . out)
    dq = scale sum of dS k      dk = scale sum of dS q      dv = sum of P g
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _neighborhood_pytorch as pytorch
from ._common import accumulation_dtype, autocast, kernels, reference_in_use
from ._neighborhood import Pair, check_fit, check_kernel, pair, window_positions

_BOUNDARIES = ("zero", "clamp")
_MOST_SHIFTS = 4


def _positions(
    length: int, size: int, dilation: int, shift: int, clamp: bool, device: torch.device
) -> Tensor:
    """Positions of the slots of every window of an axis, `(length, size)`; -1 is outside."""
    own = torch.arange(length, device=device)
    if clamp:
        table = window_positions(length, size, dilation, device)
    else:
        table = own[:, None] + (torch.arange(size, device=device) - size // 2) * dilation
        table = torch.where((table < 0) | (table >= length), -1, table)
    if shift == 0:
        return table
    rolled = table[(own - shift) % length]
    return torch.where(rolled < 0, -1, (rolled + shift) % length)


def neighborhood_attention_reference(
    qkv: Tensor,
    num_heads: int,
    kernel_size: int | Pair,
    dilation: int | Pair = 1,
    scale: float | None = None,
    boundary: str = "zero",
    shifts: Sequence[Pair] | None = None,
) -> Tensor:
    """Compute `neighborhood_attention` in plain, differentiable PyTorch, by copying all windows."""
    (height, width), size, steps = qkv.shape[1:3], pair(kernel_size), pair(dilation)
    shifts = list(shifts or [(0, 0)])
    dtype, clamp = accumulation_dtype(qkv.dtype), boundary == "clamp"
    pixels = []
    for shift in shifts:
        rows = _positions(height, size[0], steps[0], shift[0], clamp, qkv.device)[:, None, :, None]
        cols = _positions(width, size[1], steps[1], shift[1], clamp, qkv.device)[None, :, None]
        outside = (rows < 0) | (cols < 0)
        pixels.append(torch.where(outside, height * width, rows * width + cols).flatten(2))
    heads = torch.arange(num_heads, device=qkv.device)
    # `(heads, H * W, slots)`; one beyond the last pixel are zeros
    slots = torch.stack(pixels)[heads % len(shifts)].flatten(1, 2)
    tokens = qkv.flatten(1, 2).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).to(dtype)
    q, k, v = tokens.unbind(0)
    k, v = (torch.cat([t, torch.zeros_like(t[:, :, :1])], dim=2) for t in (k, v))
    k, v = (t[:, heads[:, None, None], slots] for t in (k, v))
    scores = q.unsqueeze(-2) @ k.transpose(-1, -2) * _factor(qkv, num_heads, scale)
    out = (scores.softmax(dim=-1) @ v).squeeze(-2).transpose(1, 2)
    return out.flatten(2).unflatten(1, qkv.shape[1:3]).to(qkv.dtype)


def _factor(qkv: Tensor, num_heads: int, scale: float | None) -> float:
    return (qkv.shape[-1] // (3 * num_heads)) ** -0.5 if scale is None else scale


def _window(args: Sequence[Any]) -> pytorch.Window:
    """What neighbors are, by the arguments of the op that say so."""
    rows, cols, dilation_y, dilation_x, clamp, shifts = args
    pairs = tuple(zip(shifts[::2], shifts[1::2], strict=True)) or ((0, 0),)
    return pytorch.Window((rows, cols), (dilation_y, dilation_x), clamp, pairs)


def _forward_pytorch(
    qkv: Tensor, num_heads: int, scale: float | None, *args: Any
) -> tuple[Tensor, Tensor]:
    with torch.autocast(qkv.device.type, enabled=False):
        return pytorch.forward(qkv, num_heads, _window(args), _factor(qkv, num_heads, scale))


def _backward_pytorch(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float | None,
    *args: Any,
) -> Tensor:
    factor = _factor(qkv, num_heads, scale)
    with torch.autocast(qkv.device.type, enabled=False):
        return pytorch.backward(grad, qkv, out, lse, num_heads, _window(args), factor)


_ARGUMENTS = (
    "SymInt num_heads, float? scale, SymInt rows, SymInt cols, SymInt dilation_y, "
    "SymInt dilation_x, bool clamp, SymInt[] shifts"
)


@torch.library.custom_op(
    "backbones::neighborhood_attention",
    mutates_args=(),
    schema=f"(Tensor qkv, {_ARGUMENTS}) -> (Tensor, Tensor)",
)
def _forward(qkv: Tensor, num_heads: int, scale: float | None, *args: Any) -> tuple[Tensor, Tensor]:
    # the matrix units that Triton reaches have no float64 on most devices
    if qkv.dtype == torch.float64:
        return _forward_pytorch(qkv, num_heads, scale, *args)
    return kernels("neighborhood_attention", qkv).forward(
        qkv, num_heads, args[:2], args[2:4], _factor(qkv, num_heads, scale), *args[4:]
    )


# one by one: of several devices at once PyTorch's set_kernel_enabled knows the last only
_forward.register_kernel("cpu")(_forward_pytorch)
_forward.register_kernel("mps")(_forward_pytorch)


@_forward.register_fake
def _(qkv: Tensor, num_heads: int, scale: float | None, *args: Any) -> tuple[Tensor, Tensor]:
    batch, height, width, packed = qkv.shape
    lse = qkv.new_empty((batch, num_heads, height, width), dtype=accumulation_dtype(qkv.dtype))
    return qkv.new_empty((batch, height, width, packed // 3)), lse


@torch.library.custom_op(
    "backbones::neighborhood_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor qkv, Tensor out, Tensor lse, {_ARGUMENTS}) -> Tensor",
)
def _backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float | None,
    *args: Any,
) -> Tensor:
    if qkv.dtype == torch.float64:
        return _backward_pytorch(grad, qkv, out, lse, num_heads, scale, *args)
    factor = _factor(qkv, num_heads, scale)
    return kernels("neighborhood_attention", qkv).backward(
        grad, qkv, out, lse, num_heads, args[:2], args[2:4], factor, *args[4:]
    )


_backward.register_kernel("cpu")(_backward_pytorch)
_backward.register_kernel("mps")(_backward_pytorch)


@_backward.register_fake
def _(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float | None,
    *args: Any,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    qkv, *ctx.args = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    grad_qkv = _backward(grad.contiguous(), *ctx.saved_tensors, *ctx.args)
    return grad_qkv, *(None for _ in ctx.args)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _validate(
    qkv: Tensor, num_heads: int, size: Pair, dilation: Pair, boundary: str, shifts: Sequence[Pair]
) -> None:
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads} must be positive")
    if qkv.ndim != 4 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"qkv {tuple(qkv.shape)} must be a map (B, H, W, 3C) with channels a multiple of "
            f"3 * num_heads = {3 * num_heads}"
        )
    if boundary not in _BOUNDARIES:
        raise ValueError(f"boundary={boundary!r} is not one of {_BOUNDARIES}")
    check_kernel("kernel_size", size, dilation, least=1)
    if boundary == "clamp":
        check_fit("kernel_size", qkv.shape[1], qkv.shape[2], size, dilation)
    if len(shifts) > _MOST_SHIFTS or any(len(shift) != 2 for shift in shifts):
        raise ValueError(f"shifts={shifts} must be pairs (rows, columns), at most {_MOST_SHIFTS}")


def neighborhood_attention(
    qkv: Tensor,
    num_heads: int,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    scale: float | None = None,
    boundary: str = "zero",
    shifts: list[tuple[int, int]] | None = None,
) -> Tensor:
    """Attend from every pixel of a map to a window around it.

    Args:
        qkv: Packed queries, keys and values `(B, H, W, 3C)`, each head by head.
        num_heads: Heads, of `D = C / num_heads` channels; `num_heads = C` attends by channels.
        kernel_size: Rows and columns of a window, odd; one number for both.
        dilation: Distance of its rows and columns; one number for both.
        scale: Factor of the scores before the softmax. Default: `D ** -0.5`.
        boundary: What windows do at the border of the map. "zero" lets them leave it: a slot
            outside has the score 0 and the value 0 and takes part in the softmax, as in MSA-Conv;
            the map may be smaller than a window. "clamp" shifts them inside, as in Neighborhood
            Attention; the map must be as large as a window with its dilation.
        shifts: Up to four pairs `(rows, columns)`, any integers, that the heads use in turn: the
            first the first, the second the second and so on. A head attends on the map rolled by
            minus its shift. Default: no shift.

    Returns:
        The map `(B, H, W, C)`, contiguous, channels head by head.

    Layout:
        All strides are free; the kernels copy only if those of the channels are not one.

    Numerics:
        float32, bfloat16 or float16, accumulated in float32, by Triton kernels on a GPU; float64,
        and all types on a CPU, by PyTorch. Under autocast `qkv` is cast to its type first. float32
        products follow `torch.set_float32_matmul_precision`. `qkv`, the output and the logsumexp of
        the scores are kept for the backward pass: neither windows nor weights are.

    Gradients:
        For `qkv`, deterministic, once differentiable.

    Raises:
        ValueError: Windows without a middle, or larger than the map with "clamp"; shapes that do
            not fit together; another `boundary`; more than four shifts.

    Source:
        TiC (MSA-Conv), arXiv 2310.04134; Neighborhood Attention, arXiv 2204.07143 and 2209.15001.
    """
    if torch.jit.is_scripting():
        rows, cols = _scripted_pair(kernel_size)
        dy, dx = _scripted_pair(dilation)
        flat: list[int] = []
        if shifts is not None:
            for y, x in shifts:
                flat.append(y)
                flat.append(x)
        return torch.ops.backbones.neighborhood_attention(
            qkv, num_heads, scale, rows, cols, dy, dx, boundary == "clamp", flat
        )[0]
    else:
        return _dispatch(qkv, num_heads, kernel_size, dilation, scale, boundary, shifts)


def _scripted_pair(value: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return value


def _dispatch(
    qkv: Tensor,
    num_heads: int,
    kernel_size: int | Pair,
    dilation: int | Pair,
    scale: float | None,
    boundary: str,
    shifts: Sequence[Pair] | None,
) -> Tensor:
    size, steps, pairs = pair(kernel_size), pair(dilation), list(shifts or [])
    if not isinstance(qkv, torch.fx.Proxy):
        # a trace sees sizes as tensors
        if not torch.jit.is_tracing():
            _validate(qkv, num_heads, size, steps, boundary, pairs)
        (qkv,) = autocast(qkv)
        if reference_in_use():
            return neighborhood_attention_reference(
                qkv, num_heads, size, steps, scale, boundary, pairs
            )
    flat = [int(number) for shift in pairs for number in shift]
    # through the packet, which torch.fx records; a call of the Python object it would not
    return torch.ops.backbones.neighborhood_attention(
        qkv, num_heads, scale, *size, *steps, boundary == "clamp", flat
    )[0]
