"""Attention inside the windows of a map: block and grid partition (MaxViT, DaViT, L2ViT).

A window holds `N = P * Q` tokens. In the block partition they are neighbours (Swin, arXiv
2103.14030, section 3.2); in the grid partition (MaxViT, arXiv 2204.01697, section 3.2) they lie
`ceil(H / P)` rows and `ceil(W / Q)` columns apart. With `q`, `k`, `v` of one head `(N, D)`, token i
the query, j the key, and T a table of relative positions:

    S = scale * q k^T + T[yi - yj + P - 1, xi - xj + Q - 1]      (N, N)
    A = softmax(S)      y = A v

and backward, with `g` the gradient of `y`:

    dv = A^T g          dA = g v^T          dS = A * (dA - rowsum(A * dA))
    dq = scale * dS k   dk = scale * dS^T q     dT[r] = sum of dS over all pairs of offset r

A map that the windows do not fill goes on below and to the right, with tokens that are either
hidden from every query or read the vector `pad`; they are never queries themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import (
    accumulation_dtype,
    autocast,
    kernels,
    outside_autocast,
    reference_in_use,
    runs_at_once,
)
from ._windows import (
    ONE_TILE,
    Windows,
    cells,
    cut_heads,
    fill_windows,
    inside,
    join_heads,
    merge,
    partition,
    relative_bias,
    split_heads,
    table_gradient,
)

# scores held at once, per block of windows: 1 MB in float32, so that they stay in cache
_BLOCK_SCORES = 1 << 18


def window_attention_reference(
    qkv: Tensor,
    table: Tensor | None,
    num_heads: int,
    window_size: tuple[int, int],
    grid: bool = False,
    head_first: bool = False,
    pad: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute `window_attention` in plain, differentiable PyTorch; holds all scores at once."""
    tokens, real = partition(qkv, window_size, grid), inside(qkv, window_size, grid)
    if real is not None and pad is not None:
        tokens = torch.where(real[..., None], tokens, pad.to(tokens.dtype))
    q, k, v = split_heads(tokens, num_heads, head_first)
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if table is not None:
        scores = scores + relative_bias(table, window_size)
    if real is not None and pad is None:
        scores = scores.masked_fill(~real[:, None, None, :], float("-inf"))
    out = (scores.softmax(dim=-1).to(v.dtype) @ v).transpose(-3, -2).flatten(-2)
    height, width = qkv.shape[1:3]
    return merge(out, window_size, grid, height, width)


class _Tokens:
    """The windows of one call as tensors `(B * G, heads, N, D)`."""

    def __init__(
        self, qkv: Tensor, table: Tensor | None, pad: Tensor | None, windows: Windows
    ) -> None:
        dtype = accumulation_dtype(qkv.dtype)
        self.windows, self.map_size = windows, qkv.shape[:3]
        self.q, self.k, self.v = self.cut(qkv, 3, windows.head_first, pad)
        self.bias = None if table is None else relative_bias(table.to(dtype), windows.size)
        self.hidden = None
        real = inside(qkv, windows.size, windows.grid) if pad is None else None
        if real is not None:
            self.hidden = ~real.repeat(len(qkv), 1)[:, None, None, :]

    def cut(self, x: Tensor, parts: int, head_first: bool, pad: Tensor | None = None) -> Tensor:
        """Heads `(parts, B * G, heads, N, D)` of a map `(B, H, W, parts * C)`, filled with pad."""
        windows = self.windows
        x = fill_windows(x, windows.size, pad)
        heads = cut_heads(x, parts, windows.num_heads, windows.size, windows.grid, head_first)
        return heads.to(accumulation_dtype(x.dtype))

    def blocks(self) -> Iterator[slice]:
        """Slices over the windows that bound the scores held at once."""
        count, heads, n, _ = self.q.shape
        step = max(1, _BLOCK_SCORES // (heads * n * n))
        for start in range(0, count, step):
            yield slice(start, start + step)

    def scores(self, block: slice) -> Tensor:
        """Scores `(block, heads, N, N)`."""
        scores = (self.q[block] @ self.k[block].mT).mul_(self.windows.scale)
        if self.bias is not None:
            scores += self.bias
        if self.hidden is not None:
            scores.masked_fill_(self.hidden[block], float("-inf"))
        return scores

    def join(self, heads: Tensor, head_first: bool = False) -> Tensor:
        """The map of heads `(parts, B * G, heads, N, D)`, with what continues it."""
        (batch, height, width), (p, q) = self.map_size, self.windows.size
        rows, cols = cells(height, width, (p, q))
        size = (batch, rows * p, cols * q)
        return join_heads(heads, size, (p, q), self.windows.grid, head_first)

    def crop(self, x: Tensor) -> Tensor:
        """The map `(B, H, W, C)`, contiguous, of one that `join` returns."""
        return x[:, : self.map_size[1], : self.map_size[2]].contiguous()


def _forward_pytorch(
    qkv: Tensor, table: Tensor | None, pad: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    """Compute the map; `_backward_pytorch` finds the softmax anew, so the logsumexps are zeros."""
    windows, (*size, _) = Windows(*args), qkv.shape
    dtype = accumulation_dtype(qkv.dtype)
    with outside_autocast(qkv):
        tokens = partition(fill_windows(qkv, windows.size, pad), windows.size, windows.grid)
        q, k, v = split_heads(tokens.flatten(0, 1).to(dtype), windows.num_heads, windows.head_first)
        real = inside(qkv, windows.size, windows.grid) if pad is None else None
        mask = _mask(None if table is None else table.to(dtype), real, windows, q)
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=windows.scale)
        out = out.transpose(1, 2).flatten(2).to(qkv.dtype).unflatten(0, tokens.shape[:2])
        lse = (*size, windows.num_heads) if windows.keys > ONE_TILE else (0,)
        return merge(out, windows.size, windows.grid, *size[1:]), q.new_zeros(lse)


def _mask(table: Tensor | None, real: Tensor | None, windows: Windows, q: Tensor) -> Tensor | None:
    """What to add to the scores `(B * G, heads, N, N)`: bias, and minus infinity for no token."""
    bias = None if table is None else relative_bias(table, windows.size)[None]
    if real is None:
        return bias
    hidden = q.new_zeros(real.shape).masked_fill_(~real, float("-inf"))
    hidden = hidden.repeat(len(q) // len(real), 1)[:, None, None]
    return hidden.expand(-1, -1, q.shape[2], -1) if bias is None else bias + hidden


def _backward_pytorch(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor | None,
    pad: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(qkv.device.type, enabled=False):
        windows = Windows(*args)
        tokens = _Tokens(qkv, table, pad, windows)
        q, k, v = tokens.q, tokens.k, tokens.v
        (g,) = tokens.cut(grad, 1, False)

        grads = q.new_empty(3, *q.shape)
        pairs = q.new_zeros(q.shape[1], q.shape[2], q.shape[2])
        for block in tokens.blocks():
            attention = tokens.scores(block).softmax(dim=-1)
            da = g[block] @ v[block].mT
            ds = attention * (da - (attention * da).sum(dim=-1, keepdim=True))
            for part, product in enumerate(
                (ds @ k[block], ds.mT @ q[block], attention.mT @ g[block])
            ):
                grads[part, block] = product
            pairs += ds.sum(0)
        grads[:2] *= windows.scale
        joined = tokens.join(grads, windows.head_first)
        grad_table, grad_pad = _absent(qkv), _absent(qkv)
        if table is not None:
            grad_table = table_gradient(pairs, windows.size).to(table.dtype).contiguous()
        if pad is not None:
            height, width = qkv.shape[1:3]
            below, beside = joined[:, height:], joined[:, :height, width:]
            grad_pad = (below.sum((0, 1, 2)) + beside.sum((0, 1, 2))).to(pad.dtype)
        return tokens.crop(joined.to(qkv.dtype)), grad_table, grad_pad


def _absent(qkv: Tensor) -> Tensor:
    """What an op returns in place of a tensor that there is not."""
    return qkv.new_empty(0)


@torch.library.custom_op(
    "backbones::window_attention",
    mutates_args=(),
    schema="(Tensor qkv, Tensor? table, Tensor? pad, SymInt num_heads, SymInt height, "
    "SymInt width, bool grid, bool head_first, float scale) -> (Tensor, Tensor)",
)
def _forward(
    qkv: Tensor, table: Tensor | None, pad: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    # the matrix units that Triton reaches have no float64 on most devices
    if qkv.dtype == torch.float64:
        return _forward_pytorch(qkv, table, pad, *args)
    return kernels("window_attention", qkv).forward(qkv, table, pad, Windows(*args))


# one by one: of several devices at once PyTorch's set_kernel_enabled knows the last only
_forward.register_kernel("cpu")(_forward_pytorch)
_forward.register_kernel("mps")(_forward_pytorch)


@_forward.register_fake
def _(qkv: Tensor, table: Tensor | None, pad: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    windows, (*size, channels) = Windows(*args), qkv.shape
    lse = (*size, windows.num_heads) if windows.keys > ONE_TILE else (0,)
    dtype = accumulation_dtype(qkv.dtype)
    return qkv.new_empty((*size, channels // 3)), qkv.new_empty(lse, dtype=dtype)


@torch.library.custom_op(
    "backbones::window_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor? table, Tensor? pad, Tensor? out, Tensor? lse, "
    "SymInt num_heads, SymInt height, SymInt width, bool grid, bool head_first, float scale) "
    "-> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor | None,
    pad: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    if qkv.dtype == torch.float64:
        return _backward_pytorch(grad, qkv, table, pad, out, lse, *args)
    launch = kernels("window_attention", qkv)
    return launch.backward(grad, qkv, table, pad, out, lse, Windows(*args))


_backward.register_kernel("cpu")(_backward_pytorch)
_backward.register_kernel("mps")(_backward_pytorch)


@_backward.register_fake
def _(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor | None,
    pad: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_table = _absent(qkv) if table is None else table.new_empty(table.shape)
    grad_pad = _absent(qkv) if pad is None else pad.new_empty(pad.shape)
    return qkv.new_empty(qkv.shape), grad_table, grad_pad


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    qkv, table, pad, *args = inputs
    ctx.args = args
    kept = output if Windows(*args).keys > ONE_TILE else (None, None)
    ctx.save_for_backward(qkv, table, pad, *kept)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    qkv, table, pad, out, lse = ctx.saved_tensors
    grads = _backward(grad.contiguous(), qkv, table, pad, out, lse, *ctx.args)
    present = (qkv, table, pad)
    grads = (None if t is None else g for t, g in zip(present, grads, strict=True))
    return *grads, *(None for _ in ctx.args)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _validate(
    qkv: Tensor,
    table: Tensor | None,
    pad: Tensor | None,
    num_heads: int,
    window_size: tuple[int, int],
) -> None:
    if num_heads < 1 or min(window_size) < 1:
        raise ValueError(f"num_heads={num_heads} and window_size={window_size} must be positive")
    if qkv.ndim != 4 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"qkv {tuple(qkv.shape)} must be a map (B, H, W, 3C) with channels a multiple of "
            f"3 * num_heads = {3 * num_heads}"
        )
    offsets = (num_heads, 2 * window_size[0] - 1, 2 * window_size[1] - 1)
    if table is not None and tuple(table.shape) != offsets:
        raise ValueError(
            f"table {tuple(table.shape)} must be {offsets}, (heads, 2P - 1, 2Q - 1), "
            f"for windows of {window_size}"
        )
    if pad is not None and tuple(pad.shape) != (qkv.shape[-1],):
        raise ValueError(f"pad {tuple(pad.shape)} must be a vector of {qkv.shape[-1]} like qkv")


def window_attention(
    qkv: Tensor,
    table: Tensor | None,
    num_heads: int,
    window_size: tuple[int, int],
    grid: bool = False,
    head_first: bool = False,
    pad: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend within the windows of a map.

    Args:
        qkv: Packed queries, keys and values `(B, H, W, 3C)`.
        table: Relative position bias `(num_heads, 2P - 1, 2Q - 1)`, added to the score of query i
            and key j at `[yi - yj + P - 1, xi - xj + Q - 1]`; None for none.
        num_heads: Heads, of `D = C / num_heads` channels.
        window_size: Rows `P` and columns `Q` of a window.
        grid: Windows of tokens `ceil(H / P)` rows and `ceil(W / Q)` columns apart, instead of
            neighbours.
        head_first: Channels are packed head by head, q, k, v of each (`(heads, 3, D)`), instead of
            q, k and v one after the other (`(3, heads, D)`).
        pad: Vector `(3C,)` that tokens outside the map have as q, k and v; None hides them.
        scale: Factor of the scores before the softmax. Default: `D ** -0.5`.

    Returns:
        The map `(B, H, W, C)`, contiguous, channels head by head.

    Layout:
        All strides are free; the kernels copy only if those of the channels are not one. Height and
        width need not be multiples of the window's.

    Numerics:
        float32, bfloat16 or float16, accumulated in float32, by Triton kernels on a GPU; float64,
        and all types on a CPU, by PyTorch. The table is never rounded. Under autocast `qkv` and
        `pad` are cast to its type first. float32 products follow
        `torch.set_float32_matmul_precision`. Only inputs are kept for the backward pass, from 65
        keys on also the output and the logsumexp of the scores.

    Gradients:
        For `qkv`, `table` and `pad`, deterministic, once differentiable.

    Raises:
        ValueError: Shapes that do not fit together.

    Source:
        Swin, arXiv 2103.14030, section 3.2; MaxViT, arXiv 2204.01697, section 3.2.
    """
    if torch.jit.is_scripting():
        factor = (qkv.shape[-1] // (3 * num_heads)) ** -0.5 if scale is None else scale
        height, width = window_size
        return torch.ops.backbones.window_attention(
            qkv, table, pad, num_heads, height, width, grid, head_first, factor
        )[0]
    else:
        return _dispatch(qkv, table, pad, num_heads, window_size, grid, head_first, scale)


def _dispatch(
    qkv: Tensor,
    table: Tensor | None,
    pad: Tensor | None,
    num_heads: int,
    window_size: tuple[int, int],
    grid: bool,
    head_first: bool,
    scale: float | None,
) -> Tensor:
    if not isinstance(qkv, torch.fx.Proxy):
        # a trace sees sizes as tensors
        if not torch.jit.is_tracing():
            _validate(qkv, table, pad, num_heads, window_size)
        qkv, pad = autocast(qkv, pad)
        if reference_in_use():
            return window_attention_reference(
                qkv, table, num_heads, window_size, grid, head_first, pad, scale
            )
    if scale is None:
        dim = qkv.shape[-1] // (3 * num_heads)
        # a trace would take the power in float32
        scale = (int(dim) if torch.jit.is_tracing() else dim) ** -0.5
    if not isinstance(qkv, torch.fx.Proxy) and runs_at_once(qkv):
        args = (num_heads, *window_size, grid, head_first, scale)
        return _forward_pytorch(qkv, table, pad, *args)[0]
    # through the packet, which torch.fx records; a call of the Python object it would not
    return torch.ops.backbones.window_attention(
        qkv, table, pad, num_heads, *window_size, grid, head_first, scale
    )[0]
