"""Launch of the kernel for the means of regions."""

from __future__ import annotations

import torch
from torch import Tensor

from .._regions import Regions
from ._launch import cdiv, next_power_of_2, rows_contiguous
from ._region_kernels import region_means_kernel

_BLOCK_C = 64


def region_means(qkv: Tensor, pad: Tensor | None, at: Regions) -> Tensor:
    """Compute mean queries and keys `(B, R, 2C)`, float32; see `backbones.ops.route_regions`."""
    batch, height, width, packed = qkv.shape
    channels = packed // 3 * 2
    means = qkv.new_empty((batch, at.regions, channels), dtype=torch.float32)
    qkv = rows_contiguous(qkv)
    pad = None if at.filled(height, width) or pad is None else pad.contiguous()
    programs = batch * at.regions * cdiv(channels, _BLOCK_C)
    if not programs:
        return means
    with torch.cuda.device_of(qkv):
        region_means_kernel[(programs,)](
            qkv, pad, means,
            *qkv.stride()[:3], height, width, at.regions, at.cols, at.height, at.width, channels,
            BLOCK_T=min(32, next_power_of_2(at.tokens)), BLOCK_C=_BLOCK_C,
            num_warps=4, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
    return means
