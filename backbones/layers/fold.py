"""Folding norms and scales into the linear maps beside them, for inference.

All functions change the layers in place, keep what they compute, and belong under `no_grad`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from backbones.ops import runs_at_once


def batch_norm_affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a BatchNorm does with its running statistics: scale and shift `(C,)`."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    scale = norm.weight * (variance + norm.eps).rsqrt()
    return scale, norm.bias - mean * scale


def fold_output(
    layer: nn.Conv2d | nn.Linear, scale: Tensor, shift: Tensor | None = None
) -> nn.Module:
    """Make `layer` return `scale * layer(x) + shift`, both `(C_out,)`; return the layer."""
    layer.weight.mul_(scale.reshape(-1, *(1 for _ in layer.weight.shape[1:])))
    if layer.bias is not None:
        layer.bias.mul_(scale)
    return layer if shift is None else _add_bias(layer, shift)


def fold_norm_act(conv: nn.Conv2d, norm: BatchNormAct2d) -> nn.Module:
    """Fold a BatchNorm into the convolution before it; return the activation that is left."""
    fold_output(conv, *batch_norm_affine(norm))
    return norm.act


def fold_input(layer: nn.Conv2d | nn.Linear, scale: Tensor, shift: Tensor) -> nn.Module:
    """Make `layer`, linear or a dense 1x1 convolution, take `scale * x + shift`; return it."""
    _add_bias(layer, layer.weight.flatten(1) @ shift)
    layer.weight.mul_(scale.reshape(1, -1, *(1 for _ in layer.weight.shape[2:])))
    return layer


def _add_bias(layer: nn.Conv2d | nn.Linear, shift: Tensor) -> nn.Module:
    if layer.bias is None:
        layer.bias = nn.Parameter(shift)
    else:
        layer.bias.add_(shift)
    return layer


class FoldedLayerNorm(nn.LayerNorm):
    """A LayerNorm whose weight and bias went elsewhere.

    Args:
        size: Of the last dimensions.
        eps: Added to the variances.
    """

    def __init__(self, size: tuple[int, ...], eps: float) -> None:
        super().__init__(size, eps, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(..., *size)`."""
        if torch.jit.is_scripting():
            return F.layer_norm(x, self.normalized_shape, None, None, self.eps)
        else:
            # PyTorch's kernel for a CPU is slower without a bias
            bias = x.new_zeros(self.normalized_shape) if runs_at_once(x) else None
            return F.layer_norm(x, self.normalized_shape, None, bias, self.eps)


def fold_layer_norm(norm: nn.LayerNorm, *layers: nn.Linear) -> nn.LayerNorm:
    """Move weight and bias of a LayerNorm into the linear layers that read its output.

    Args:
        norm: The norm.
        layers: All layers behind it.

    Returns:
        The norm without weight and bias, or `norm` if it has none.
    """
    if norm.weight is None:
        return norm
    for layer in layers:
        fold_input(layer, norm.weight, norm.bias)
    return FoldedLayerNorm(norm.normalized_shape, norm.eps)


def fold_layer_scale(layer: nn.Linear, scale: nn.Module) -> nn.Module:
    """Move a LayerScale into the linear layer before it.

    Args:
        layer: The layer.
        scale: timm's LayerScale, or an Identity.

    Returns:
        An Identity.
    """
    gamma = getattr(scale, "gamma", None)
    if isinstance(gamma, torch.Tensor):
        fold_output(layer, gamma)
    return nn.Identity()
