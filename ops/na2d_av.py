"""Weighted sums over windows that never leave the map: natten 0.17's `na2d_av`.

With `K = rows * cols` weights per pixel and head, and the window of a pixel as in
`_neighborhood.py`, whose start is `(sy, sx)`:

    out[y, x] = sum over slots (a, b) of attn[y, x, a * cols + b] value[sy + a * dy, sx + b * dx]

Backward, with `g` the gradient of `out`: that of a weight is the product of `g[y, x]` with the
value of its slot, and that of a value the sum of `attn g` over all slots that are its pixel.

natten removed the op in 0.20. Kernels and CPU take a row of the map in blocks of neighboring
queries: their weights of one row of slots, put where the keys lie, are a banded matrix, and the sum
is its product with a row of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._common import accumulation_dtype, kernels, reference_in_use
from ._neighborhood import Pair, check_windows, pair, window_pixels, window_starts

# queries of a block of a row: more of them leave more of the band empty
_QUERIES = 16
# weights of the bands held at once: 1 MB in float32, to stay in cache
_BLOCK = 1 << 18


def na2d_av_reference(
    attn: Tensor, value: Tensor, kernel_size: int | Pair, dilation: int | Pair = 1
) -> Tensor:
    """Compute `na2d_av` in plain, differentiable PyTorch, by copying the window of every pixel."""
    height, width = value.shape[2:4]
    steps = pair(dilation)
    pixels = window_pixels(height, width, pair(kernel_size), steps, value.device)
    windows = value.flatten(2, 3).index_select(2, pixels.flatten()).unflatten(2, pixels.shape)
    # which would take the type of the products
    with torch.autocast(value.device.type, enabled=False):
        return (attn.to(value.dtype).unsqueeze(-2) @ windows).squeeze(-2)


@dataclass(frozen=True)
class _Block:
    """Weights of neighboring queries of a row, for the images and heads that fit the cache.

    Attributes:
        images: Which images and heads.
        queries: Which columns are queries.
        keys: Which columns their windows cover.
        dense: Banded matrices `(images, queries, rows, keys)`, zero outside the band.
        runs: Columns of queries, and their part of the band `(images, columns, rows, cols)`.
    """

    images: slice
    queries: slice
    keys: slice
    dense: Tensor
    runs: list[tuple[slice, Tensor]]


def _runs(dense: Tensor, first: int, starts: list[int], cols: int) -> list[tuple[slice, Tensor]]:
    """Views of the slots in a banded matrix, whose first query is `first`.

    Near a border windows stay where they are, elsewhere each starts one column further on.
    """
    runs, begin = [], 0
    images, queries, rows, _ = dense.shape
    strides = dense.stride()
    while begin < queries:
        end, step = begin + 1, 0
        if end < queries:
            step = starts[end] - starts[begin]
            while end < queries and starts[end] - starts[end - 1] == step:
                end += 1
        offset = begin * strides[1] + starts[begin] - starts[0]
        view = dense.as_strided(
            (images, end - begin, rows, cols),
            (strides[0], strides[1] + step, strides[2], 1),
            dense.storage_offset() + offset,
        )
        runs.append((slice(first + begin, first + end), view))
        begin = end
    return runs


def _blocks(attn: Tensor, dtype: torch.dtype) -> Iterator[_Block]:
    """Blocks of the queries of a row, of weights `(images, H, W, rows, cols)`."""
    images, _, width, rows, cols = attn.shape
    starts = window_starts(width, cols).tolist()
    for first in range(0, width, _QUERIES):
        queries = slice(first, min(first + _QUERIES, width))
        keys = slice(starts[first], starts[queries.stop - 1] + cols)
        shape = (queries.stop - first, rows, keys.stop - keys.start)
        step = max(1, _BLOCK // (shape[0] * shape[1] * shape[2]))
        for image in range(0, images, step):
            count = min(step, images - image)
            dense = torch.zeros(count, *shape, dtype=dtype, device=attn.device)
            runs = _runs(dense, first, starts[queries], cols)
            yield _Block(slice(image, image + count), queries, keys, dense, runs)


def _grids(maps: tuple[Tensor, ...], size: Pair, steps: Pair) -> Iterator[tuple[Tensor, ...]]:
    """Views `(B * G, H', W', ...)` of maps `(B, G, H, W, ...)`; the first, of weights, has slots.

    Pixels of one residue are neighbors of no others: they are a map of their own.
    """
    first, *others = (x.flatten(0, 1) for x in maps)
    flat = (first.unflatten(-1, size), *others)
    for y in range(steps[0]):
        for x in range(steps[1]):
            yield tuple(m[:, y :: steps[0], x :: steps[1]] for m in flat)


def _forward_pytorch(attn: Tensor, value: Tensor, *args: Any) -> Tensor:
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    with torch.autocast(value.device.type, enabled=False):
        for grids in _grids((attn, value, out), args[:2], args[2:]):
            _write_sums(*grids)
    return out


def _write_sums(attn: Tensor, value: Tensor, out: Tensor) -> None:
    """Write the sums over undilated windows, for maps `(images, H, W, ...)`."""
    rows, dtype = attn.shape[3], accumulation_dtype(value.dtype)
    starts = window_starts(attn.shape[1], rows).tolist()
    for block in _blocks(attn, dtype):
        images, queries = block.images, block.queries
        for y, start in enumerate(starts):
            for columns, slots in block.runs:
                slots.copy_(attn[images, y, columns])
            keys = value[images, start : start + rows, block.keys].flatten(1, 2)
            out[images, y, queries] = (block.dense.flatten(2) @ keys.to(dtype)).to(out.dtype)


def _backward_pytorch(
    grad: Tensor, attn: Tensor, value: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    grad_attn = torch.empty(attn.shape, dtype=attn.dtype, device=attn.device)
    dtype = accumulation_dtype(value.dtype)
    grad_value = torch.zeros(value.shape, dtype=dtype, device=value.device)
    with torch.autocast(value.device.type, enabled=False):
        inputs = _grids((attn, value, grad, grad_value), args[:2], args[2:])
        outputs = _grids((grad_attn,), args[:2], args[2:])
        for grids, (weights,) in zip(inputs, outputs, strict=True):
            _write_gradients(weights, *grids)
    return grad_attn, grad_value.to(value.dtype)


def _write_gradients(
    grad_attn: Tensor, attn: Tensor, value: Tensor, grad: Tensor, grad_value: Tensor
) -> None:
    """Write the gradients of weights, add those of values, for maps `(images, H, W, ...)`."""
    rows, dtype = attn.shape[3], grad_value.dtype
    starts = window_starts(attn.shape[1], rows).tolist()
    # two matrices of the same form: one has the weights, one their gradients
    for block, other in zip(_blocks(attn, dtype), _blocks(attn, dtype), strict=True):
        images = block.images
        dense, pairs = block.dense.flatten(2), other.dense.flatten(2)
        for y, start in enumerate(starts):
            window = (images, slice(start, start + rows), block.keys)
            g = grad[images, y, block.queries].to(dtype)
            torch.bmm(g, value[window].flatten(1, 2).to(dtype).mT, out=pairs)
            for (columns, slots), (_, products) in zip(block.runs, other.runs, strict=True):
                slots.copy_(attn[images, y, columns])
                grad_attn[images, y, columns] = products.to(grad_attn.dtype)
            grad_value[window] += (dense.mT @ g).unflatten(1, (rows, -1))


_SIZES = "SymInt rows, SymInt cols, SymInt dilation_y, SymInt dilation_x"


@torch.library.custom_op(
    "backbones::na2d_av",
    mutates_args=(),
    schema=f"(Tensor attn, Tensor value, {_SIZES}) -> Tensor",
)
def _forward(attn: Tensor, value: Tensor, *args: Any) -> Tensor:
    # the matrix units that Triton reaches have no float64 on most devices
    if value.dtype == torch.float64:
        return _forward_pytorch(attn, value, *args)
    return kernels("na2d_av", value).forward(attn, value, args[:2], args[2:])


# one by one: of several devices at once PyTorch's set_kernel_enabled knows the last only
_forward.register_kernel("cpu")(_forward_pytorch)
_forward.register_kernel("mps")(_forward_pytorch)


@_forward.register_fake
def _(attn: Tensor, value: Tensor, *args: Any) -> Tensor:
    return value.new_empty(value.shape)


@torch.library.custom_op(
    "backbones::na2d_av_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor attn, Tensor value, {_SIZES}) -> (Tensor, Tensor)",
)
def _backward(grad: Tensor, attn: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if value.dtype == torch.float64:
        return _backward_pytorch(grad, attn, value, *args)
    return kernels("na2d_av", value).backward(grad, attn, value, args[:2], args[2:])


_backward.register_kernel("cpu")(_backward_pytorch)
_backward.register_kernel("mps")(_backward_pytorch)


@_backward.register_fake
def _(grad: Tensor, attn: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return attn.new_empty(attn.shape), value.new_empty(value.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    attn, value, *ctx.args = inputs
    ctx.save_for_backward(attn, value)


def _autograd(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    return *_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.args), *(None for _ in ctx.args)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _validate(attn: Tensor, value: Tensor, size: Pair, dilation: Pair) -> None:
    if value.ndim != 5:
        raise ValueError(f"value {tuple(value.shape)} must be (B, heads, H, W, D)")
    check_windows("kernel_size", value.shape[2], value.shape[3], size, dilation)
    expected = (*value.shape[:4], size[0] * size[1])
    if tuple(attn.shape) != expected:
        raise ValueError(
            f"attn {tuple(attn.shape)} must be {expected}: for every pixel and head of value a "
            f"weight for each of the {size[0]} x {size[1]} slots of its window"
        )


def na2d_av(
    attn: Tensor, value: Tensor, kernel_size: int | Pair, dilation: int | Pair = 1
) -> Tensor:
    """Sum the values of every pixel's window with the weights of that pixel.

    Takes what natten 0.17's `na2d_av` takes, and returns what it returned. There, and here, windows
    are shifted inside the map at its borders, and slots are counted from their start.

    Args:
        attn: Weights `(B, G, H, W, rows * cols)` of the slots, row by row; not normalised here.
        value: Values of G heads `(B, G, H, W, D)`.
        kernel_size: Rows and columns of a window, odd and 3 or more; one number for both.
        dilation: Distance of its rows and columns; times `kernel_size` at most the map's.

    Returns:
        The sums `(B, G, H, W, D)`, contiguous, in the type of `value`.

    Layout:
        All strides are free; the kernels copy only if those of slots or channels are not one.

    Numerics:
        float32, bfloat16 or float16, summed in float32, by Triton kernels on a GPU; float64, and
        all types on a CPU, by PyTorch. `attn` is first cast to the type of `value`, as natten did,
        under autocast too, which changes nothing else. float32 products follow
        `torch.set_float32_matmul_precision`. Only the arguments are kept for the backward pass.

    Gradients:
        For both, deterministic, once differentiable.

    Raises:
        ValueError: Windows without a middle or larger than the map, shapes that do not fit.

    Source:
        Neighborhood Attention, arXiv 2204.07143 and 2209.15001; OverLoCK (arXiv 2502.20087) uses it
        to apply its dynamic kernels.
    """
    if torch.jit.is_scripting():
        rows, cols = _scripted_pair(kernel_size)
        dy, dx = _scripted_pair(dilation)
        return torch.ops.backbones.na2d_av(attn.to(value.dtype), value, rows, cols, dy, dx)
    else:
        return _dispatch(attn, value, kernel_size, dilation)


def _scripted_pair(value: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return value


def _dispatch(attn: Tensor, value: Tensor, kernel_size: int | Pair, dilation: int | Pair) -> Tensor:
    size, steps = pair(kernel_size), pair(dilation)
    if not isinstance(value, torch.fx.Proxy):
        # a trace sees sizes as tensors
        if not torch.jit.is_tracing():
            _validate(attn, value, size, steps)
        if reference_in_use():
            return na2d_av_reference(attn, value, size, steps)
    # through the packet, which torch.fx records; a call of the Python object it would not
    return torch.ops.backbones.na2d_av(attn.to(value.dtype), value, *size, *steps)
