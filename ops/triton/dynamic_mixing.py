"""Launch of the dynamic mixing kernels: one form for each half of the call.

Queries of the same window start form a class: small maps have few (4 for windows of 13 on a map of
14 x 14), and each is plain attention to one window (`_mixing_class.py`). The others take windows
row by row (`_mixing_band.py`).
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from ._launch import rows_contiguous
from ._mixing import Half
from ._mixing_fold import fold

# the class form is for maps of so few pixels, with so few distinct windows: with more of them most
# classes are far smaller than a tile
_PIXELS = 256
_WINDOWS = 9


def form(half: Half) -> ModuleType:
    """The module that computes a half."""
    rows, cols = half.windows
    few = half.height * half.width <= _PIXELS and rows * cols <= _WINDOWS
    # only what is needed is imported
    return importlib.import_module("._mixing_class" if few else "._mixing_band", __package__)


def halves(
    query: Tensor,
    kernel: Tensor,
    value: Tensor,
    bias: Tensor,
    table_small: Tensor,
    table_large: Tensor,
) -> list[Half]:
    """The two halves of a call, that of the small kernels first."""
    query, kernel, value = (rows_contiguous(x) for x in (query, kernel, value))
    bias, *tables = (x.to(torch.float32).contiguous() for x in (bias, table_small, table_large))
    found, slot, channel = [], 0, 0
    for table in tables:
        size = (table.shape[-1] + 1) // 2
        found.append(Half(query, kernel, value, bias, table, size, slot, channel))
        slot, channel = slot + size**2, channel + query.shape[-1]
    return found


def forward(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the forward pass; see `backbones.ops.dynamic_mixing`.

    Returns:
        The output `(B, H, W, C)` and the logsumexp of the logits `(2, B, G, H, W)`, in float32.
    """
    both = halves(*inputs)
    value, heads = inputs[2], both[0].heads
    out = value.new_empty(value.shape)
    lse = value.new_empty((2, len(value), heads, *value.shape[1:3]), dtype=torch.float32)
    if value.numel():
        with torch.cuda.device_of(value):
            for half, part in zip(both, lse, strict=True):
                form(half).forward(half, out, part)
    return out, lse


def backward(grad: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
    """Launch the backward pass.

    Args:
        grad: Gradient of the output, contiguous.
        saved: The six inputs, the output and the logsumexp.

    Returns:
        The gradients of the six inputs.
    """
    *inputs, out, lse = saved
    query, kernel, value, bias, *tables = inputs
    grads = [x.new_empty(x.shape) for x in (query, kernel, value)]
    if value.numel() == 0:
        return *grads, *(torch.zeros_like(x) for x in (bias, *tables))
    # the small half first, in float32: the other adds it to its own part
    first = query.new_empty(query.shape, dtype=torch.float32)
    small, large = halves(*inputs)
    with torch.cuda.device_of(value):
        logits = [
            form(small).backward(small, grad, out, lse[0], None, first, *grads[1:]),
            form(large).backward(large, grad, out, lse[1], first, *grads),
        ]
        folded = [fold(x.contiguous()) for x in logits]
    grad_bias = torch.cat([x for _, x in folded]).to(bias.dtype)
    return *grads, grad_bias, *(x.to(t.dtype) for (x, _), t in zip(folded, tables, strict=True))
