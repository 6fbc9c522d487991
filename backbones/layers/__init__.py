"""Small layers that the families share."""

from .conv_norm import ConvNorm, NormLinear, Residual

__all__ = ["ConvNorm", "NormLinear", "Residual"]
