"""Launch of the channel attention kernels: tiles, programs, outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..channel_attention import roles, score_scale
from ._channel_kernels import channel_bwd_kernel, channel_fwd_kernel, channel_sum_kernel
from ._launch import input_precision, next_power_of_2, rows_contiguous
from ._token_reduction import split_tokens


class _Call:
    """The arguments that all kernels of one call share."""

    def __init__(self, qkv: Tensor, num_heads: int, mix_values: bool, scale: float | None) -> None:
        self.qkv, self.heads = rows_contiguous(qkv), num_heads
        self.batch, self.height, self.width, packed = qkv.shape
        self.channels = packed // 3
        self.dim = self.channels // num_heads
        self.scale = score_scale(qkv, num_heads, mix_values, scale)
        self.parts = tuple(role * self.channels for role in roles(mix_values))
        self.block = block_n(self.dim, self.height * self.width)
        self.split = split_tokens(qkv, self.problems, self.height * self.width, self.block)

    @property
    def problems(self) -> int:
        """Images times heads."""
        return self.batch * self.heads

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the map, its heads, and the tokens of a program."""
        return self.height, self.width, self.heads, self.split.chunk

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments and options."""
        wide = self.qkv.dtype == torch.float32
        return {
            "D": self.dim,
            "BLOCK_N": self.block,
            "BLOCK_D": max(16, next_power_of_2(self.dim)),
            "PRECISION": input_precision(self.qkv),
            "num_warps": 8 if wide else 4,
            "num_stages": 2,
            "enable_fp_fusion": True,
        }

    def sums(self, x: Tensor, x_part: int, y: Tensor, y_part: int) -> Tensor | None:
        """Sum x^T y over the tokens, `(B * heads, D, D)`; None if one program does all."""
        if self.split.parts == 1:
            return None
        shape = (self.split.parts, self.problems, self.dim, self.dim)
        sums = x.new_empty(shape, dtype=torch.float32)
        channel_sum_kernel[(self.problems, self.split.parts)](
            x, y, sums, *x.stride()[:3], *y.stride()[:3], *self.sizes, x_part, y_part,
            **self.constants,
        )  # fmt: skip
        return sums.sum(0)


def block_n(dim: int, tokens: int) -> int:
    """Tokens of a tile of heads of `dim` channels."""
    return 64 if dim > 32 or tokens <= 64 else 128


def forward(
    qkv: Tensor, num_heads: int, mix_values: bool, scale: float | None, keep: bool
) -> tuple[Tensor, Tensor]:
    """Launch the forward pass; see `backbones.ops.channel_attention`.

    Returns:
        The output `(B, H, W, C)`, and with `keep` the weights `(B, heads, D, D)` in float32, else
        an empty tensor.
    """
    call = _Call(qkv, num_heads, mix_values, scale)
    out = qkv.new_empty((*qkv.shape[:3], call.channels))
    shape = (call.batch, num_heads, call.dim, call.dim) if keep else 0
    weights = qkv.new_empty(shape, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        sums = call.sums(call.qkv, call.parts[0], call.qkv, call.parts[1])
        channel_fwd_kernel[(call.problems, call.split.parts)](
            call.qkv, sums, weights if keep else None, out,
            *call.qkv.stride()[:3], *call.sizes, call.scale, call.channels, *call.parts,
            **call.constants,
        )  # fmt: skip
    return out, weights


def backward(
    grad: Tensor,
    qkv: Tensor,
    weights: Tensor,
    num_heads: int,
    mix_values: bool,
    scale: float | None,
) -> Tensor:
    """Launch the backward pass; return the gradient of `qkv`."""
    call = _Call(qkv, num_heads, mix_values, scale)
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    with torch.cuda.device_of(qkv):
        sums = call.sums(grad, 0, call.qkv, call.parts[2])
        channel_bwd_kernel[(call.problems, call.split.parts)](
            grad, call.qkv, sums, weights, grad_qkv,
            *call.qkv.stride()[:3], *call.sizes, call.scale, call.channels, *call.parts,
            **call.constants,
        )  # fmt: skip
    return grad_qkv
