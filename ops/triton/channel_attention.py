"""Launch of the channel attention kernels: tiles, programs, outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..channel_attention import roles, score_scale
from ._channel_kernels import channel_bwd_kernel, channel_fwd_kernel, channel_sum_kernel
from ._launch import input_precision, next_power_of_2
from ._token_reduction import Reduction, add_parts


class _Call(Reduction):
    """The arguments that all kernels of one call share."""

    def __init__(self, qkv: Tensor, num_heads: int, mix_values: bool, scale: float | None) -> None:
        super().__init__(qkv, 3, num_heads)
        self.scale = score_scale(qkv, num_heads, mix_values, scale)
        self.parts = tuple(role * self.channels for role in roles(mix_values))
        self.block = block_n(self.dim, self.height * self.width)
        self.share_out(self.block)

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
        sums = self.empty_parts(self.dim, self.dim)
        channel_sum_kernel[self.grid](
            x, y, sums, *x.stride()[:3], *y.stride()[:3], *self.sizes, x_part, y_part,
            **self.constants,
        )  # fmt: skip
        return add_parts(sums)


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
        channel_fwd_kernel[call.grid](
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
        channel_bwd_kernel[call.grid](
            grad, call.qkv, sums, weights, grad_qkv,
            *call.qkv.stride()[:3], *call.sizes, call.scale, call.channels, *call.parts,
            **call.constants,
        )  # fmt: skip
    return grad_qkv
