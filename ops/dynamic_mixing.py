"""Mixing of a map by kernels that are made for every pixel (OverLoCK's ContMix).

A pixel is the weighted sum of its neighbors, in windows that never leave the map
(`_neighborhood.py`); the weights are a softmax over the window. Half of the channels have windows
of a small size, half of a large one. With the query `q` `(D,)` of a pixel and one head, the
kernels M `(D, K * K)` that were generated for the head and the image, a bias b of the slots, a
table T of relative positions, and the windows' first pixels `s`:

    l[a, b] = q . M[:, (a, b)] + b[(a, b)] + T[sy + a - y + K - 1, sx + b - x + K - 1]
    p = softmax over the K * K slots of l           out = sum of p[a, b] v[sy + a, sx + b]

ContMix writes the weights as `softmax(Wp (Kx^T q) + b)`, with the keys Kx `(D, 49)` of 49 regions
and a matrix Wp `(slots, 49)`: `M = Kx Wp^T` says the same, and is formed once for all pixels.
Backward, with g the gradient of `out`:

    dp = g . v[window]      dl = p (dp - g . out)       dv[window] = sum of p g
    dq = M dl               dM = sum of q dl^T          db, dT = sum of dl over slots, and offsets

Weights are never held for a whole map: they are computed anew for the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _mixing
from ._common import accumulation_dtype, autocast, kernels, reference_in_use
from ._neighborhood import own_slots, window_pixels


def dynamic_mixing_reference(
    query: Tensor,
    kernel: Tensor,
    value: Tensor,
    bias: Tensor,
    table_small: Tensor,
    table_large: Tensor,
) -> Tensor:
    """Compute `dynamic_mixing` in plain, differentiable PyTorch; holds all weights and windows."""
    heads, tables = kernel.shape[1], (table_small, table_large)
    slots = [size**2 for size in _mixing.sizes(tables)]
    queries = query.unflatten(-1, (heads, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    logits = (queries @ kernel + bias).split(slots, -1)
    values = value.unflatten(-1, (2, heads, -1)).permute(3, 0, 4, 1, 2, 5)
    halves = [_mix(*parts) for parts in zip(logits, tables, values, strict=True)]
    return torch.stack(halves, dim=-3).flatten(-3)


def _mix(logits: Tensor, table: Tensor, value: Tensor) -> Tensor:
    """One half `(B, H, W, G, D)` of the logits `(B, G, H * W, K * K)` and values of a map."""
    (height, width), size = value.shape[2:4], (table.shape[-1] + 1) // 2
    slots, device = torch.arange(size, device=table.device), table.device
    rows, cols = (
        slots - own_slots(length, size, device=device)[:, None] + size - 1
        for length in (height, width)
    )
    position = table[:, rows[:, None, :, None], cols[None, :, None, :]]
    weights = (logits + position.flatten(3).flatten(1, 2)).softmax(dim=-1).to(value.dtype)
    pixels = window_pixels(height, width, (size, size), device=device).flatten()
    windows = value.flatten(2, 3).index_select(2, pixels).unflatten(2, (height * width, -1))
    mixed = (weights.unsqueeze(-2) @ windows).squeeze(-2)
    return mixed.unflatten(2, (height, width)).permute(0, 2, 3, 1, 4)


@torch.library.custom_op("backbones::dynamic_mixing", mutates_args=())
def _forward(
    query: Tensor,
    kernel: Tensor,
    value: Tensor,
    bias: Tensor,
    table_small: Tensor,
    table_large: Tensor,
) -> tuple[Tensor, Tensor]:
    inputs = query, kernel, value, bias, table_small, table_large
    # the matrix units that Triton reaches have no float64 on most devices
    if query.dtype == torch.float64:
        return _mixing.forward(*inputs)
    return kernels("dynamic_mixing", query).forward(*inputs)


# one by one: of several devices at once PyTorch's set_kernel_enabled knows the last only
_forward.register_kernel("cpu")(_mixing.forward)
_forward.register_kernel("mps")(_mixing.forward)


@_forward.register_fake
def _(
    query: Tensor,
    kernel: Tensor,
    value: Tensor,
    bias: Tensor,
    table_small: Tensor,
    table_large: Tensor,
) -> tuple[Tensor, Tensor]:
    batch, *size, _ = value.shape
    lse = (2, batch, kernel.shape[1], *size)
    dtype = accumulation_dtype(query.dtype)
    return value.new_empty(value.shape), value.new_empty(lse, dtype=dtype)


@torch.library.custom_op("backbones::dynamic_mixing_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    kernel: Tensor,
    value: Tensor,
    bias: Tensor,
    table_small: Tensor,
    table_large: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    saved = query, kernel, value, bias, table_small, table_large, out, lse
    if query.dtype == torch.float64:
        return _mixing.backward(grad, *saved)
    return kernels("dynamic_mixing", query).backward(grad, *saved)


_backward.register_kernel("cpu")(_mixing.backward)
_backward.register_kernel("mps")(_mixing.backward)


@_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    kernel: Tensor,
    value: Tensor,
    bias: Tensor,
    table_small: Tensor,
    table_large: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, ...]:
    inputs = query, kernel, value, bias, table_small, table_large
    return tuple(x.new_empty(x.shape) for x in inputs)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    return _backward(grad.contiguous(), *ctx.saved_tensors)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _validate(query: Tensor, kernel: Tensor, value: Tensor, bias: Tensor, *tables: Tensor) -> None:
    if value.ndim != 4 or kernel.ndim != 4:
        raise ValueError(
            f"value {tuple(value.shape)} must be a map (B, H, W, C), and kernel "
            f"{tuple(kernel.shape)} have the shape (B, G, C / 2G, slots)"
        )
    (batch, height, width, channels), heads = value.shape, kernel.shape[1]
    for table in tables:
        side = table.shape[-1]
        if tuple(table.shape) != (heads, side, side) or side % 4 != 1:
            raise ValueError(
                f"table {tuple(table.shape)} must be ({heads}, 2K - 1, 2K - 1), for heads of "
                f"kernel {tuple(kernel.shape)} and an odd size K of windows"
            )
    found = _mixing.sizes(tables)
    slots = sum(size**2 for size in found)
    expected = {
        "query": (batch, height, width, channels // 2),
        "kernel": (batch, heads, channels // (2 * heads), slots),
        "bias": (slots,),
    }
    for name, tensor in (("query", query), ("kernel", kernel), ("bias", bias)):
        if tuple(tensor.shape) != expected[name] or channels % (2 * heads):
            raise ValueError(
                f"{name} {tuple(tensor.shape)} must be {expected[name]}, for value "
                f"{tuple(value.shape)}, {heads} heads and windows of {found}"
            )
    if min(height, width) < max(found):
        raise ValueError(
            f"value {tuple(value.shape)} must have {max(found)} rows and columns or more, for "
            f"windows of {found}: enlarge the map first"
        )


def dynamic_mixing(
    query: Tensor,
    kernel: Tensor,
    value: Tensor,
    bias: Tensor,
    table_small: Tensor,
    table_large: Tensor,
) -> Tensor:
    """Mix every pixel with its neighbors, by weights that its query takes from generated kernels.

    Heads G, their channels `D = C / 2G`, and the sizes `s` and `l` of the windows are those of the
    shapes. `s` and `l` are odd; near borders windows are shifted inside the map.

    Args:
        query: Queries `(B, H, W, C / 2)`, head by head, scaled already.
        kernel: Generated kernels `(B, G, D, s * s + l * l)`, the slots of small windows first, each
            row by row.
        value: Values `(B, H, W, C)`: half of the channels for small windows, then half for large
            ones, each head by head.
        bias: Bias `(s * s + l * l,)` of the slots.
        table_small: Relative position bias `(G, 2s - 1, 2s - 1)` of small windows, at the row and
            the column of the neighbor minus those of the pixel, plus `s - 1`.
        table_large: The same `(G, 2l - 1, 2l - 1)` of large windows.

    Returns:
        The map `(B, H, W, C)`, contiguous, channels as in `value`.

    Layout:
        All strides are free; the kernels copy only if those of the channels, or slots, are not one.

    Numerics:
        float32, bfloat16 or float16, accumulated in float32, by Triton kernels on a GPU; float64,
        and all types on a CPU, by PyTorch. Bias and tables are never rounded. Under autocast
        `query`, `kernel` and `value` are cast to its type first. float32 products follow
        `torch.set_float32_matmul_precision`. Inputs, the output and the logsumexp of the logits are
        kept for the backward pass.

    Gradients:
        For all six, deterministic, once differentiable.

    Raises:
        ValueError: Shapes that do not fit together, or a map smaller than its windows.

    Source:
        OverLoCK, arXiv 2502.20087; official code, `models/contmix.py`.
    """
    if torch.jit.is_scripting():
        return torch.ops.backbones.dynamic_mixing(
            query, kernel, value, bias, table_small, table_large
        )[0]
    else:
        return _dispatch(query, kernel, value, bias, table_small, table_large)


def _dispatch(
    query: Tensor,
    kernel: Tensor,
    value: Tensor,
    bias: Tensor,
    table_small: Tensor,
    table_large: Tensor,
) -> Tensor:
    small = bias, table_small, table_large
    if not isinstance(query, torch.fx.Proxy):
        # a trace sees sizes as tensors
        if not torch.jit.is_tracing():
            _validate(query, kernel, value, *small)
        query, kernel, value = autocast(query, kernel, value)
        if reference_in_use():
            return dynamic_mixing_reference(query, kernel, value, *small)
    # through the packet, which torch.fx records; a call of the Python object it would not
    return torch.ops.backbones.dynamic_mixing(query, kernel, value, *small)[0]
