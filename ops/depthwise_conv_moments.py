"""Mean and variance of depthwise convolutions of a map, for the norms behind them.

The large kernels of OverLoCK train as a sum of dilated convolutions, each with a BatchNorm. Such a
sum is one convolution once the statistics are known, so nothing but these is computed here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import accumulation_dtype


def depthwise_conv_moments_reference(
    x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Compute `depthwise_conv_moments` in plain, differentiable PyTorch."""
    means, variances = [], []
    for weight, dilation in zip(weights, dilations, strict=True):
        pad = dilation * (weight.shape[-1] // 2)
        z = F.conv2d(x.permute(0, 3, 1, 2), weight, None, 1, pad, dilation, x.shape[3])
        wide = z.to(accumulation_dtype(z.dtype))
        variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        means.append(mean)
        variances.append(variance)
    return torch.stack(means), torch.stack(variances)


def depthwise_conv_moments(
    x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Average depthwise convolutions of a map and their squared deviations, over batch and map."""
    return depthwise_conv_moments_reference(x, weights, dilations)
