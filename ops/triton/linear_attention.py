"""Launch of the linear attention kernels: tiles, programs, outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._launch import input_precision, next_power_of_2
from ._linear_kernels import (
    linear_bwd_kernel,
    linear_bwd_sum_kernel,
    linear_fwd_kernel,
    linear_sum_kernel,
)
from ._token_reduction import Reduction, add_parts


class _Call(Reduction):
    """The arguments that all kernels of one call share."""

    def __init__(
        self, qkv: Tensor, temperature: Tensor, block: Callable[[Tensor, int], int]
    ) -> None:
        super().__init__(qkv, 3, temperature.shape[0])
        self.temperature, self.block = temperature.contiguous(), block(qkv, self.dim)
        self.share_out(self.block)

    @property
    def state_shape(self) -> tuple[int, int]:
        """Of S over z."""
        return self.dim + 1, self.dim

    @property
    def layout(self) -> tuple[int, ...]:
        """Strides of the packed map, sizes, and channels of a part."""
        return *self.qkv.stride()[:3], *self.sizes, self.channels

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments and options."""
        large = self.dim > 32 or self.block > 64 or self.qkv.dtype == torch.float32
        return {
            "D": self.dim,
            "BLOCK_N": self.block,
            "BLOCK_D": max(16, next_power_of_2(self.dim)),
            "PRECISION": input_precision(self.qkv),
            "num_warps": 8 if large else 4,
            "num_stages": 2,
            "enable_fp_fusion": True,
        }


# products of float32 leave the matrix units: their operands fill the registers
def forward_block(qkv: Tensor, dim: int) -> int:
    """Tokens of a tile of heads of `dim` channels."""
    if dim > 32:
        return 32 if qkv.dtype == torch.float32 else 64
    return 64 if qkv.shape[1] * qkv.shape[2] <= 64 else 128


def backward_block(qkv: Tensor, dim: int) -> int:
    """The same in the backward pass, which holds more tiles at once."""
    most = 64 if dim <= 32 else 32
    return most // 2 if qkv.dtype == torch.float32 else most


def forward(
    qkv: Tensor, temperature: Tensor, min_denominator: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """Launch the forward pass; see `backbones.ops.linear_attention`.

    Returns:
        The output `(B, H, W, C)`, and with `keep` S over z `(B, heads, D + 1, D)` in float32, else
        an empty tensor.
    """
    call = _Call(qkv, temperature, forward_block)
    out = qkv.new_empty((*qkv.shape[:3], call.channels))
    alone, state = call.split.parts == 1, None
    with torch.cuda.device_of(qkv):
        if not alone:
            states = call.empty_parts(*call.state_shape)
            linear_sum_kernel[call.grid](call.qkv, states, *call.layout, **call.constants)
            state = add_parts(states)
        elif keep:
            state = call.empty(*call.state_shape)
        linear_fwd_kernel[call.grid](
            call.qkv, call.temperature, state, out, *call.layout, min_denominator, alone,
            **call.constants,
        )  # fmt: skip
    if state is None or not keep:
        return out, qkv.new_empty(0, dtype=torch.float32)
    return out, state.unflatten(0, (call.batch, call.heads))


def backward(
    grad: Tensor, qkv: Tensor, temperature: Tensor, state: Tensor, min_denominator: float
) -> tuple[Tensor, Tensor]:
    """Launch the backward pass; return the gradients of `qkv` and `temperature`."""
    call = _Call(qkv, temperature, backward_block)
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    grad_state, grad_temperature = None, call.empty()
    tail = (*call.layout, min_denominator)
    with torch.cuda.device_of(qkv):
        if call.split.parts > 1:
            grad_states = call.empty_parts(*call.state_shape)
            linear_bwd_sum_kernel[call.grid](
                grad, call.qkv, call.temperature, state, grad_states, grad_qkv, *tail,
                **call.constants,
            )  # fmt: skip
            grad_state = add_parts(grad_states)
        linear_bwd_kernel[call.grid](
            grad, call.qkv, call.temperature, state, grad_state, grad_temperature, grad_qkv, *tail,
            **call.constants,
        )  # fmt: skip
    grad_temperature = grad_temperature.view(call.batch, call.heads).sum(0)
    return grad_qkv, grad_temperature.to(temperature.dtype)
