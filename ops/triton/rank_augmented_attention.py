"""Launch of the rank-augmented attention kernels: tiles, programs, outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._launch import input_precision, next_power_of_2, rows_contiguous
from ._rank_augmented_backward_kernels import (
    rank_augmented_bwd_kv_kernel,
    rank_augmented_bwd_q_kernel,
    rank_augmented_bwd_state_kernel,
)
from ._rank_augmented_kernels import (
    rank_augmented_fwd_kernel,
    rank_augmented_mean_kernel,
    rank_augmented_merge_kernel,
    rank_augmented_state_kernel,
)
from ._token_reduction import Reduction, add_parts

# parts that a program of the merge loads at once
_MERGED = 16


class _Call(Reduction):
    """The arguments that all kernels of one call share."""

    def __init__(
        self, qkv: Tensor, rotary: Tensor, addend: Tensor | None, num_heads: int, gated: bool
    ) -> None:
        super().__init__(qkv, 3 + gated, num_heads)
        self.gated = gated
        self.rotary = rotary.to(torch.float32).contiguous()
        self.addend = None if addend is None else rows_contiguous(addend)
        self.block_d = max(32, next_power_of_2(self.dim))
        self.block_n = block_n(qkv, self.block_d)
        self.share_out(self.block_n)

    @property
    def scale(self) -> float:
        """The factor of the scores of the keys."""
        return self.dim**-0.5

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the packed map and the addend."""
        addend = (0, 0, 0) if self.addend is None else self.addend.stride()[:3]
        return *self.qkv.stride()[:3], *addend

    @property
    def span(self) -> int:
        """Positions of the table."""
        return self.rotary.shape[1]

    @property
    def tiles(self) -> dict[str, Any]:
        """Tiles and options of a pass over the tokens."""
        return {
            "D": self.dim,
            "BLOCK_N": self.block_n,
            "BLOCK_D": self.block_d,
            "num_warps": 8,
            "num_stages": 1 if self.block_d > 64 and self.qkv.dtype == torch.float32 else 2,
            "enable_fp_fusion": True,
        }

    def products(self, most: int = 64) -> dict[str, Any]:
        """The same for one with matrix products, in tiles of at most so many tokens."""
        tiles = {**self.tiles, "PRECISION": input_precision(self.qkv)}
        return tiles | {"BLOCK_N": min(most, self.block_n)}


def block_n(qkv: Tensor, block_d: int) -> int:
    """Tokens of a tile of heads of up to `block_d` channels."""
    # products of float32 leave the matrix units: their operands fill the registers
    if qkv.dtype == torch.float32:
        return 16
    return 64 if block_d <= 64 else 32


def _mean(call: _Call) -> Tensor:
    """The mean of phi of the queries, `(B * heads, D)`."""
    means = call.empty_parts(call.dim)
    rank_augmented_mean_kernel[call.grid](
        call.qkv, means, *call.qkv.stride()[:3], *call.sizes, **call.tiles
    )
    return add_parts(means)


def _state(call: _Call, mean: Tensor) -> tuple[Tensor, Tensor]:
    """S over c `(B * heads, D + 1, D)`, and the logarithm of what their softmax sums to."""
    states, lses = call.empty_parts(call.dim + 1, call.dim), call.empty_parts()
    rank_augmented_state_kernel[call.grid](
        call.qkv, call.rotary, mean, states, lses,
        *call.qkv.stride()[:3], *call.sizes, call.span, call.scale, call.channels,
        **call.products(),
    )  # fmt: skip
    if call.split.parts == 1:
        return states[0], lses[0]
    state, lse = call.empty(call.dim + 1, call.dim), call.empty()
    rank_augmented_merge_kernel[(call.problems, call.dim + 1)](
        states, lses, state, lse, call.split.parts,
        call.dim, _MERGED, call.block_d,
        num_warps=4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    return state, lse


def forward(
    qkv: Tensor, rotary: Tensor, addend: Tensor | None, num_heads: int, gated: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward pass; see `backbones.ops.rank_augmented_attention`.

    Returns:
        The output `(B, H, W, C)`; with `keep`, in float32, S over c `(B, heads, D + 1, D)`, the
        mean query `(B, heads, D)` and the logarithm of what the softmax sums to `(B, heads)`, else
        empty tensors.
    """
    call = _Call(qkv, rotary, addend, num_heads, gated)
    out = qkv.new_empty((*qkv.shape[:3], call.channels))
    with torch.cuda.device_of(qkv):
        mean = _mean(call)
        state, lse = _state(call, mean)
        rank_augmented_fwd_kernel[call.grid](
            call.qkv, call.rotary, call.addend, state, out,
            *call.strides, *call.sizes, call.span, call.channels, gated, **call.products(),
        )  # fmt: skip
    if not keep:
        return out, state.new_empty(0), state.new_empty(0), state.new_empty(0)
    heads = (call.batch, num_heads)
    return out, state.unflatten(0, heads), mean.unflatten(0, heads), lse.unflatten(0, heads)


def backward(
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
    """Launch the backward pass; see `backbones.ops.rank_augmented_attention`.

    Returns:
        The gradient of `qkv`, and with an addend and a gate that of `addend`, else an empty tensor.
    """
    call = _Call(qkv, rotary, addend, num_heads, gated)
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    grad_addend = None
    if addend is not None and gated:
        grad_addend = torch.empty(addend.shape, dtype=addend.dtype, device=qkv.device)
    strides = call.strides
    with torch.cuda.device_of(qkv):
        states, means = call.empty_parts(call.dim + 1, call.dim), call.empty_parts(call.dim)
        rank_augmented_bwd_state_kernel[call.grid](
            grad, call.qkv, call.rotary, call.addend, state, states, grad_qkv, grad_addend,
            *strides, *call.sizes, call.span, call.channels, gated, **call.products(32),
        )  # fmt: skip
        rank_augmented_bwd_kv_kernel[call.grid](
            call.qkv, call.rotary, mean, lse, state, add_parts(states), means, grad_qkv,
            *strides[:3], *call.sizes, call.span, call.scale, call.channels, gated,
            **call.products(),
        )  # fmt: skip
        rank_augmented_bwd_q_kernel[call.grid](
            grad, call.qkv, call.rotary, state, add_parts(means), grad_qkv,
            *strides[:3], *call.sizes, call.span, call.channels, gated, **call.products(),
        )  # fmt: skip
    return grad_qkv, qkv.new_empty(0) if grad_addend is None else grad_addend
